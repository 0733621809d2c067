"""COCO folders become rows with nothing lost, or are refused with file, id and remedy."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from pycocotools.coco import COCO

from m2f_trainer.data.dataset import Category, categories_of, load_coco
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
    images = [{"id": i, "file_name": "a.png", "height": 16, "width": 20} for i in (4, 1)]
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


def place(root: Path, annotations: str, image: str) -> None:
    for path in (root / annotations, root / image):
        path.parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).write_text(json.dumps(content()))
    (root / image).write_bytes(b"")


@pytest.mark.parametrize(
    ("annotations", "image", "split"),
    [
        ("train/_annotations.coco.json", "train/a.png", "train"),
        ("val/_annotations.coco.json", "val/a.png", "valid"),
        ("validation/_annotations.coco.json", "validation/images/a.png", "valid"),
        ("test/_annotations.coco.json", "test/a.png", "test"),
        ("annotations/instances_train2017.json", "train2017/a.png", "train"),
        ("annotations/instances_val2017.json", "images/val2017/a.png", "valid"),
        ("annotations/instances_valid.json", "images/a.png", "valid"),
        ("annotations/instances_test.json", "test/a.png", "test"),
        ("annotations/instances_default.json", "images/default/a.png", "train"),
        ("annotations/train.json", "a.png", "train"),
        ("result.json", "images/a.png", "train"),
        ("_annotations.coco.json", "a.png", "train"),
    ],
)
def test_layouts_are_found_by_themselves(annotations, image, split, tmp_path):
    place(tmp_path / "set", annotations, image)
    splits = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert list(splits) == [split]
    assert splits[split][0]["image"]["path"] == str((tmp_path / "set" / image).resolve())


def test_any_layout_can_be_told(tmp_path):
    place(tmp_path / "set", "labels/mine.json", "pictures/a.png")
    splits = load_coco(
        tmp_path / "set", cache_dir=tmp_path / "c", annotations={"val": "labels/mine.json"}, images={"val": "pictures"}
    )
    assert splits["valid"][0]["image"]["path"].endswith("pictures/a.png")
    with pytest.raises(DataError, match=r"other\.json: expected the annotation file of split 'train', found nothing"):
        load_coco(tmp_path / "set", annotations={"train": "other.json"})
    with pytest.raises(DataError, match="expected the image folder of split 'val', found nothing"):
        load_coco(tmp_path / "set", annotations={"val": "labels/mine.json"}, images={"val": "photos"})
    with pytest.raises(DataError, match="split 'dev': expected annotations for one of train"):
        load_coco(tmp_path / "set", annotations={"dev": "labels/mine.json"})


def test_folders_that_are_no_dataset_are_refused_with_what_they_hold(tmp_path):
    with pytest.raises(DataError, match="expected a dataset folder, found nothing"):
        load_coco(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"found no COCO annotations.*holds photos"):
        load_coco(tmp_path)
    place(tmp_path, "annotations/instances_val.json", "a.png")
    place(tmp_path, "annotations/instances_valid.json", "a.png")
    with pytest.raises(DataError, match="two annotation files for split 'valid'"):
        load_coco(tmp_path)


IMAGE = {"id": 1, "file_name": "a.png", "height": 16, "width": 20}
BAD_FILES = {
    "empty": ("", "not valid JSON"),
    "cut": (json.dumps(content())[:-20], "truncated or damaged"),
    "deep": ("[" * 100_000, "nested too deeply|not valid JSON"),
    "a list": ("[]", "expected a COCO object"),
    "null": ("null", "got a null"),
    "no images": (content(images=None), "list under the key 'images', got a null"),
    "no annotations": ({"images": [], "categories": []}, "list under the key 'annotations', got only 'images'"),
    "entry is no object": (content(categories=[3]), "expected objects in 'categories', got a int at index 0"),
    "empty images": (content(images=[]), "`images` is empty"),
    "nothing annotated": ({**content(), "annotations": []}, "expected annotated objects, found none"),
    "image without id": (content(images=[{"file_name": "a.png"}]), "whole number as `id`, found none"),
    "text image id": (content(images=[{**IMAGE, "id": "1"}]), "got '1' .ids are numbers, not text"),
    "fraction id": (content(annotation(1.5)), "got 1.5"),
    "boolean id": (content(annotation(True)), "got True"),
    "huge id": (content(annotation(2**63)), "whole number as `id`"),
    "text image_id": (content(annotation(7, image_id="1")), "annotation 7: expected a whole number as `image_id`"),
    "no category_id": (
        content(annotation(7, category_id=None)),
        "annotation 7: expected a whole number as `category_id`",
    ),
    "image twice": (content(images=[IMAGE, IMAGE]), "image ids must be unique, found more than once: 1"),
    "annotation twice": (
        content(annotation(4), annotation(4)),
        "annotation ids must be unique, found more than once: 4",
    ),
    "category twice": (content(categories=[{"id": 5, "name": "a"}] * 2), "category ids must be unique"),
    "category without name": (content(categories=[{"id": 5}]), "category 5: expected a `name`"),
    "missing image": (content(annotation(8, image_id=3)), r"1 annotation\(s\) refer to an image.*ids 8"),
    "missing category": (content(annotation(8, category_id=3)), r"1 annotation\(s\) refer to a category.*ids 8"),
    "text crowd": (content(annotation(8, iscrowd="0")), "`iscrowd` that isn't 0 or 1: ids 8"),
    "no file name": (content(images=[{**IMAGE, "file_name": None}]), "image 1: expected a `file_name`, got None"),
    "no height": (content(images=[{**IMAGE, "height": None}]), "got None and 20"),
    "size 0": (content(images=[{**IMAGE, "width": 0}]), "got 16 and 0"),
    "bomb": (content(images=[{**IMAGE, "width": 2**31, "height": 2**31}]), "whole numbers from 1, of at most"),
    "bad polygon": (content(annotation(6, segmentation=[[1, 2, 3]])), "annotation 6 of image 1 .a.png., polygon 0"),
    "box only": (content(annotation(6, segmentation=[])), "annotation 6 .*segmentation is empty"),
    "bad box": (content(annotation(6, bbox=[1, 2, 3])), "annotation 6 .*expected a `bbox` of four numbers"),
    "NaN box": (json.dumps(content(annotation(6, bbox=[1, 2, 3, float("nan")]))), "expected a `bbox`"),
    "NaN area": (json.dumps(content(annotation(6, area=float("nan")))), "annotation 6 .*expected an `area`.*got nan"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_annotation_files_are_refused_with_file_id_and_remedy(name, tmp_path):
    coco, message = BAD_FILES[name]
    root = write(tmp_path / "set", coco)
    with pytest.raises(DataError, match=message) as error:
        load_coco(root, cache_dir=tmp_path / "cache")
    assert "train/_annotations.coco.json" in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_the_first_ten_ids_of_many_are_named_with_their_count(tmp_path):
    root = write(tmp_path / "set", content(*(annotation(i, image_id=3) for i in range(1, 31))))
    with pytest.raises(DataError, match=r"30 annotation.*ids 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\. \(30 in all\)"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_a_byte_order_mark_is_no_fault_but_another_encoding_is(tmp_path):
    root = write(tmp_path / "set", content())
    file = root / "train/_annotations.coco.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(load_coco(root, cache_dir=tmp_path / "cache")["train"]) == 1
    file.write_bytes(json.dumps(content()).encode("utf-16"))
    with pytest.raises(DataError, match="expected UTF-8"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_one_id_with_two_names_is_refused(tmp_path):
    write(tmp_path, content())
    write(tmp_path, content(categories=[{"id": 5, "name": "nucleus"}]), split="valid")
    with pytest.raises(DataError, match=r"category 5 is 'cell' in .* but 'nucleus' in"):
        load_coco(tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "name",
    ["../a.png", "x/../../a.png", "/etc/hostname", "..", "a\0.png", "x\\a.png", "link.png", "out/a.png", "C:\\a.png"],
)
def test_file_names_that_leave_the_image_folder_are_refused(name, tmp_path):
    root = write(tmp_path / "set", content(images=[{**IMAGE, "file_name": name}]))
    (root / "a.png").write_bytes(b"secret")
    (root / "train/link.png").symlink_to(root / "a.png")
    (root / "train/out").symlink_to(root)
    with pytest.raises(DataError, match="file_name"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_overlapping_objects_keep_every_pixel(tmp_path):
    root = write(tmp_path / "set", content(annotation(1), annotation(2)))
    row = load_coco(root, cache_dir=tmp_path / "cache")["train"][0]
    counts = masks.to_counts(SQUARE, 16, 20, "test")
    assert [entry["counts"] for entry in row["objects"]] == [counts, counts]
