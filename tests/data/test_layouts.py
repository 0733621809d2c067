"""Annotation files and image folders are found in the layouts that tools write, or where they are said to be."""

import json
from pathlib import Path

import pytest

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.errors import DataError
from tests.data.folders import content


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
