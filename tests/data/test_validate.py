"""What would stop training is found before it starts, and images are decoded once per content of the dataset."""

import multiprocessing
import os
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data import validate
from m2f_trainer.data.dataset import Category, categories_of, load_coco
from m2f_trainer.data.hub_dataset import load_hub
from m2f_trainer.data.transforms import image_name
from m2f_trainer.data.validate import check_dataset, match_rows
from m2f_trainer.errors import DataError, ImageError
from tests.data.folders import REAL, annotation, content, needs_real_data, write
from tests.data.test_hub_dataset import as_pushed


@needs_real_data
@pytest.mark.parametrize("name", ["coco_tiny", "nuclei_tiny"])
def test_real_data_passes(name, tmp_path):
    check_dataset(load_coco(REAL / name, cache_dir=tmp_path))


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "set", content(), split="valid")
    return write(tmp_path / "set", content())


def load(root):
    return load_coco(root, cache_dir=root.parent / "cache")


def test_a_missing_split_is_named_with_those_that_are_there(root):
    with pytest.raises(DataError, match="expected a split 'test' with images, found train, valid"):
        check_dataset(load(root), evaluation=["test"])


def test_a_missing_image_is_named(root):
    (root / "valid/a.png").unlink()
    with pytest.raises(ImageError, match=r"split 'valid': 1 image.*\n.*image 1 .*valid/a\.png.*can't be read"):
        check_dataset(load(root))


def test_a_damaged_image_is_named(root):
    noise = np.random.default_rng(0).integers(0, 255, size=(16, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train/a.png")
    (root / "train/a.png").write_bytes((root / "train/a.png").read_bytes()[:-300])
    with pytest.raises(ImageError, match=r"image 1 .*train/a\.png.*damaged"):
        check_dataset(load(root))


def test_a_size_that_differs_from_the_annotations_is_named(root):
    Image.new("RGB", (40, 32)).save(root / "train/a.png")
    with pytest.raises(ImageError, match="expected 20x16 pixels as its annotations say, got 40x32"):
        check_dataset(load(root))


def test_the_first_ten_of_many_bad_images_are_listed(root):
    images = [{"id": i, "file_name": f"{i}.png", "height": 16, "width": 20} for i in range(1, 26)]
    write(root, content(images=images))
    with pytest.raises(ImageError, match=r"25 image\(s\) can't be used(?s:.*)and 15 more") as error:
        check_dataset(load(root))
    assert str(error.value).count("\n") == 11


def test_a_training_split_of_crowd_regions_alone_is_refused(root):
    crowd = annotation(segmentation={"size": [16, 20], "counts": [300, 20]}, iscrowd=1)
    write(root, content(crowd))
    with pytest.raises(DataError, match="found only crowd regions or none"):
        check_dataset(load(root))
    check_dataset(load(root), train="", evaluation=["train"])


def test_a_validation_split_without_objects_is_refused(root):
    with_objects = load(root)["valid"]
    write(root, {**content(), "annotations": []}, split="valid")
    splits = load(root)
    with pytest.raises(DataError, match="split 'valid': expected objects to evaluate on"):
        check_dataset(splits)
    splits["valid"] = datasets.concatenate_datasets([splits["valid"], with_objects]).select([0])
    with pytest.raises(DataError, match="split 'valid'"):
        check_dataset(splits)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded."""
    names = []
    original = validate.read_image
    monkeypatch.setattr(validate, "read_image", lambda row: names.append(image_name(row)) or original(row))
    return names


def test_images_are_decoded_at_the_first_start_and_again_only_after_a_file_changed(root, decoded):
    check_dataset(load(root))
    assert len(decoded) == 2
    check_dataset(load(root))
    assert len(decoded) == 2
    Image.new("RGB", (20, 16), "red").save(root / "valid/a.png")
    for _ in range(2):
        check_dataset(load(root))
        assert len(decoded) == 4, "both splits, as after a change of the annotations"


def test_images_that_can_not_be_used_are_looked_at_again_at_every_start(root, decoded):
    (root / "train/a.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ImageError, match="the file is empty"):
            check_dataset(load(root))
    assert len(decoded) == 2


def test_embedded_images_of_a_hub_dataset_are_decoded_once(root, decoded, tmp_path):
    folder = as_pushed(load(root), tmp_path / "pushed")
    for _ in range(2):
        check_dataset(load_hub(folder, cache_dir=str(tmp_path / "hub")))
    assert len(decoded) == 2


def one_rank(rank: int, port: int, root: str, cache: str, results: "multiprocessing.Queue[tuple[int, str, int]]"):
    """The problems that one of two ranks reports for a dataset, and the number of images that it decodes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    from accelerate import PartialState

    count, original = [], validate.read_image
    validate.read_image = lambda row: count.append(image_name(row)) or original(row)
    state, message = PartialState(cpu=True), ""
    try:
        check_dataset(load_coco(root, cache_dir=cache))
    except ImageError as error:
        message = str(error)
    results.put((rank, message, len(count)))
    state.destroy_process_group()


def test_ranks_share_the_decoding_and_agree_on_what_is_wrong(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "height": 16, "width": 20} for i in range(1, 7)]
    for split in ("train", "valid"):
        write(tmp_path / "set", content(images=images), split=split)
        for i in range(1, 7):
            Image.new("RGB", (20, 16)).save(tmp_path / "set" / split / f"{i}.png")
    Path(tmp_path / "set/valid/4.png").write_bytes(b"")
    load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=one_rank, args=(rank, port, str(tmp_path / "set"), str(tmp_path / "cache"), results))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    reports = sorted(results.get(timeout=280) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert [count for _, _, count in reports] == [6, 6]
    assert reports[0][1] == reports[1][1]
    assert "split 'valid': 1 image(s) can't be used" in reports[0][1]


@pytest.mark.parametrize(
    ("name", "sound"), [("cell", True), (" Cell", True), ("5", True), ("nucleus", False), ("7", False)]
)
def test_an_id_that_means_another_class_to_the_model_is_refused(name, sound, root):
    rows = load(root)["valid"]
    known = [Category(2, "wall"), Category(5, name)]
    if sound:
        assert match_rows(known, rows) is rows
        return
    with pytest.raises(DataError, match=f"category 5 is '{name}' in the model and 'cell' in the dataset"):
        match_rows(known, rows)


def test_rows_get_the_ids_of_the_model_by_name(root):
    names = [{"id": 5, "name": "cell"}, {"id": 6, "name": " Wall"}, {"id": 7, "name": "other"}]
    write(root, content(*(annotation(key, category_id=key) for key in (5, 6, 7)), categories=names))
    rows = match_rows([Category(2, "wall"), Category(6, "cell")], load(root)["train"])
    assert categories_of(rows) == (Category(2, "wall"), Category(6, "cell"), Category(7, "other"))
    assert {one["id"]: one["category_id"] for one in rows[0]["objects"]} == {5: 6, 6: 2, 7: 7}
    with pytest.raises(DataError, match="category 7 is 'gap' in the model and 'other' in the dataset"):
        match_rows([Category(7, "gap")], load(root)["train"])
