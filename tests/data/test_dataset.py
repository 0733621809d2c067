"""COCO folders become rows with nothing lost, or are refused with file, id and remedy."""

from collections.abc import Iterable

import datasets
import numpy as np
import pytest
from pycocotools.coco import COCO

from m2f_trainer.data.dataset import Category, batches_of_rows, categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.validate import check_split
from m2f_trainer.errors import DataError
from m2f_trainer.masks import segmentation as masks
from tests.data.folders import REAL, SQUARE, annotation, content, needs_real_data, write

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools


@needs_real_data
@pytest.mark.parametrize("name", ["coco_tiny", "nuclei_tiny"])
def test_every_mask_of_real_data_equals_pycocotools(name, tmp_path):
    for split, rows in load_coco(REAL / name, cache_dir=tmp_path).items():
        truth = COCO(str(REAL / name / split / "_annotations.coco.json"))
        assert [row["image_id"] for row in rows] == [image["id"] for image in truth.dataset["images"]]
        for row in rows:
            expected = truth.imgToAnns[row["image_id"]]
            assert [entry["id"] for entry in row["objects"]] == [entry["id"] for entry in expected]
            for entry, official in zip(row["objects"], expected, strict=True):
                mask = masks.decode(entry["counts"], row["height"], row["width"])
                assert np.array_equal(mask, truth.annToMask(official))
                assert entry["category_id"] == official["category_id"]
                assert entry["bbox"] == official["bbox"]
                assert entry["area"] == official["area"]
                assert entry["iscrowd"] == bool(official["iscrowd"])


def test_a_row_holds_path_size_and_objects(tmp_path):
    crowd = annotation(9, iscrowd=1, segmentation={"size": [16, 20], "counts": [300, 20]})
    bare = {key: value for key, value in annotation(3).items() if key not in ("bbox", "area", "iscrowd")}
    rows = load_coco(write(tmp_path / "set", content(crowd, bare)), cache_dir=tmp_path / "cache")["train"]
    assert rows[0]["image"] == {"path": str((tmp_path / "set/train/a.png").resolve()), "bytes": None}
    assert (rows[0]["image_id"], rows[0]["height"], rows[0]["width"]) == (1, 16, 20)
    first, second = rows[0]["objects"]
    assert (first["id"], first["iscrowd"], second["id"], second["iscrowd"]) == (9, True, 3, False)
    assert (second["bbox"], second["area"]) == ([2.0, 3.0, 10.0, 8.0], 80.0)


def test_images_without_objects_stay(tmp_path):
    images = [{"id": i, "file_name": f"{name}.png", "height": 16, "width": 20} for i, name in ((4, "b"), (1, "a"))]
    rows = load_coco(write(tmp_path / "set", content(images=images)), cache_dir=tmp_path / "cache")["train"]
    assert [(row["image_id"], len(row["objects"])) for row in rows] == [(4, 0), (1, 1)]


def test_categories_are_those_used_in_any_split_by_id_and_survive_cache_and_disk(tmp_path):
    names = [{"id": i, "name": n} for i, n in ((90, "dog"), (0, "animals"), (7, "cat"))]
    write(tmp_path / "set", content(annotation(category_id=90), categories=names))
    root = write(tmp_path / "set", content(annotation(category_id=7), categories=names), split="valid")
    expected = (Category(7, "cat"), Category(90, "dog"))
    for _ in range(2):
        splits = load_coco(root, cache_dir=tmp_path / "cache")
        assert {categories_of(split) for split in splits.values()} == {expected}
    assert not splits["train"].info.description
    splits["train"].save_to_disk(tmp_path / "disk")
    assert categories_of(datasets.load_from_disk(tmp_path / "disk")) == expected


def test_a_dataset_of_another_origin_has_no_categories():
    with pytest.raises(DataError, match="load_coco"):
        categories_of(datasets.Dataset.from_dict({"a": [1]}))


def test_the_cache_is_used_until_the_annotation_file_changes(tmp_path):
    root = write(tmp_path / "set", content())
    first = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    again = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert first.cache_files == again.cache_files
    write(root, content(annotation(), annotation(2)))
    assert len(load_coco(root, cache_dir=tmp_path / "cache")["train"][0]["objects"]) == 2


def test_sizes_that_the_annotations_lack_are_read_anew_where_an_image_is_replaced(tmp_path):
    for size in ((20, 16), (40, 32)):
        root = write(tmp_path / "set", content(images=[{"id": 1, "file_name": "a.png"}]), size=size)
        splits = load_coco(root, cache_dir=tmp_path / "cache")
        assert (splits["train"][0]["width"], splits["train"][0]["height"]) == size
        check_split(splits, "train")


def test_one_id_with_two_names_is_refused(tmp_path):
    write(tmp_path, content())
    write(tmp_path, content(categories=[{"id": 5, "name": "nucleus"}]), split="valid")
    with pytest.raises(DataError, match=r"category 5 is 'cell' in .* but 'nucleus' in"):
        load_coco(tmp_path, cache_dir=tmp_path / "cache")


def test_overlapping_objects_keep_every_pixel(tmp_path):
    root = write(tmp_path / "set", content(annotation(1), annotation(2)))
    row = load_coco(root, cache_dir=tmp_path / "cache")["train"][0]
    counts = masks.to_counts(SQUARE, 16, 20, "test")
    assert [entry["counts"] for entry in row["objects"]] == [counts, counts]


def test_a_cache_that_can_not_be_written_is_named_with_the_variable_that_moves_it(tmp_path, monkeypatch):
    root = write_sample(tmp_path / "set", images=(2, 1, 0))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file/datasets")
    with pytest.raises(DataError, match=r"file/datasets: .* can't be written .*variable HF_DATASETS_CACHE, or HF_HOME"):
        load_coco(root)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "closed")
    monkeypatch.setattr("m2f_trainer.data.dataset.os.access", lambda *_: False)  # datasets replaces the os of builders
    with pytest.raises(DataError, match=r"closed: .* can't be written \(permission denied\)"):
        load_coco(root)


def test_rows_with_images_inside_are_written_in_lists_that_fit_in_memory() -> None:
    def lengths(images: Iterable[bytes | None]) -> list[int]:
        return [len(batch) for batch in batches_of_rows({"image": {"path": "a", "bytes": one}} for one in images)]

    assert lengths([None] * 2001) == [1000, 1000, 1]
    assert lengths([bytes(2**26)] * 5 + [None]) == [2, 2, 2], "128 MiB"
    assert lengths([]) == []
