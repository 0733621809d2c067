"""Annotation files and image folders are found in the layouts that tools write, or where options name them."""

import gzip
import json
from pathlib import Path

import pytest

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.formats import find_splits
from m2f_trainer.data.layouts import given_layout, split_paths
from m2f_trainer.errors import DataError
from tests.data.folders import content


def place(root: Path, annotations: str, image: str) -> None:
    for path in (root / annotations, root / image):
        path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content()).encode()
    (root / annotations).write_bytes(gzip.compress(data) if annotations.endswith(".gz") else data)
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
        ("train/labels.json", "train/data/a.png", "train"),  # FiftyOne
        ("labels/train.json", "data/train/a.png", "train"),  # FiftyOne
        ("annotations/train/instances.json", "images/train/a.png", "train"),
        ("labels/val/x.json", "val/a.png", "valid"),
        ("anno/train.json", "train/a.png", "train"),
        ("coco/cells_train_v2.json", "photos/a.png", "train"),
        ("annotations/cells-val-coco.json", "images/a.png", "valid"),
        ("val/any name.json", "val/images/a.png", "valid"),
        ("test/annotations/x.json", "test/img/a.png", "test"),
        ("Train/Labels.JSON", "Train/Images/a.png", "train"),
        ("Annotations/instances_Train.json", "Images/a.png", "train"),
        ("Annotations/instances_val.json", "JPEGImages/VAL/a.png", "valid"),
        ("my set/annotations/instances_train2017.json", "my set/train2017/a.png", "train"),
        ("export/my set/train/_annotations.coco.json", "export/my set/train/a.png", "train"),
        ("ds0/annotations/instances.json", "ds0/images/a.png", "train"),  # Supervisely
        ("annotations/lvis_v1_train.json", "train2017/a.png", "train"),  # LVIS
        ("annotations/instances_train.json", "images/train/a.png", "train"),  # Datumaro
        ("annotations/instances_train.json.gz", "images/train/a.png", "train"),
        ("Train Set/_annotations.coco.json", "Train Set/a.png", "train"),
        ("Validation Set/_annotations.coco.json", "Validation Set/a.png", "valid"),
    ],
)
def test_layouts_are_found_by_themselves(annotations, image, split, tmp_path):
    place(tmp_path / "set", annotations, image)
    splits = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert list(splits) == [split]
    assert splits[split][0]["image"]["path"] == str((tmp_path / "set" / image).resolve())


def test_any_layout_can_be_given(tmp_path):
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
    with pytest.raises(DataError, match=r"there is no such file or folder\. Expected a dataset folder"):
        load_coco(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"found no annotations; the folder holds photos"):
        load_coco(tmp_path)
    place(tmp_path, "annotations/instances_val.json", "a.png")
    place(tmp_path, "annotations/instances_valid.json", "a.png")
    with pytest.raises(DataError, match="two annotation files for split 'valid'"):
        load_coco(tmp_path)


def test_hidden_files_and_those_of_other_systems_are_passed_over(tmp_path):
    place(tmp_path / "set", "train/x.json", "train/a.png")
    place(tmp_path / "set", "train/.x.json", "train/.a.png")
    place(tmp_path / "set", "__MACOSX/train/x.json", "__MACOSX/train/a.png")
    place(tmp_path / "set", ".cache/x.json", ".cache/a.png")
    (tmp_path / "set/train/._x.json").write_bytes(b"\0\5\x16\7")
    splits = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert splits["train"][0]["image"]["path"] == str((tmp_path / "set/train/a.png").resolve())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("annotations/instances_Train.json", "annotations/instances_default.json"), "default.json is named after no"),
        (("annotations.json", "annotations_batch2.json"), "two annotation files for split 'train'"),
        (("train/a.json", "train/b.json"), "two annotation files for split 'train'"),
        (("ds0/labels.json", "ds1/labels.json"), "found 2 datasets in it: .*ds0, .*ds1"),
    ],
)
def test_annotation_files_of_which_one_would_be_dropped_are_refused(files, message, tmp_path):
    for file in files:
        place(tmp_path / "set", file, "a.png")
    with pytest.raises(DataError, match=f"{message}.*--annotations"):
        load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")


def test_the_other_tasks_of_coco_are_left_aside(tmp_path):
    for name in ("instances_train2017", "captions_train2017", "person_keypoints_train2017"):
        place(tmp_path / "set", f"annotations/{name}.json", "train2017/a.png")
    layout = find_splits(tmp_path / "set")
    assert [files.annotations.name for files in layout.splits] == ["instances_train2017.json"]
    assert [path.name for path in layout.aside({"train": [tmp_path / "set/train2017"]})] == [
        "captions_train2017.json",
        "person_keypoints_train2017.json",
    ]


def test_the_labels_of_datumaro_are_left_aside(tmp_path):
    for name in ("instances_default", "labels_default"):
        place(tmp_path / "set", f"annotations/{name}.json", "images/default/a.png")
    assert [files.annotations.name for files in find_splits(tmp_path / "set").splits] == ["instances_default.json"]


def test_given_paths_are_also_looked_for_in_the_working_directory(tmp_path, monkeypatch):
    place(tmp_path / "set", "labels/mine.json", "pictures/a.png")
    place(tmp_path, "other.json", "photos/a.png")
    monkeypatch.chdir(tmp_path)
    (files,) = given_layout("set", {"train": "other.json"}, {"train": "photos"})
    assert (files.annotations, files.image_folders) == (Path("other.json"), (Path("photos"),))
    (files,) = given_layout("set", {"train": "labels/mine.json"})
    assert files.annotations == Path("set/labels/mine.json")


@pytest.mark.parametrize("value", ["a.json", "train=", "=a.json", "dev=a.json"])
def test_a_path_without_its_split_is_refused(value):
    with pytest.raises(DataError, match="expected SPLIT=PATH with one of the splits train"):
        split_paths([value], "annotations")
    with pytest.raises(DataError, match="split 'val' is given twice"):
        split_paths(["valid=a", "val=b"], "images")
    assert split_paths(["train=a=b.json", "val=c"], "images") == {"train": "a=b.json", "val": "c"}
