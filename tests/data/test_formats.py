"""Datasets are found as a folder or file, described once, and refused by name where another tool converts them."""

import json
import logging
import re

import pytest

from m2f_trainer.data.dataset import load_coco, log_once
from m2f_trainer.data.formats import OTHER_FORMATS, find_splits
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.errors import DataError
from tests.data.exports import EXPORTS, coco, label_studio, pictures, roboflow, train_and_val_files_in_the_folder, vgg
from tests.data.folders import content
from tests.data.test_layouts import place
from tests.data.test_mask_images import masked
from tests.data.test_yolo import yolo


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is left in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def test_the_path_of_a_json_or_yaml_itself_is_a_dataset(tmp_path):
    root = label_studio(tmp_path / "a")
    splits = load_coco(root / "result.json", cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 5, "valid": 1}
    place(tmp_path / "b", "annotations/instances_val.json", "images/val/a.png")
    (row,) = load_coco(tmp_path / "b/annotations/instances_val.json", cache_dir=tmp_path / "cache")["train"]
    assert row["image"]["path"].endswith("images/val/a.png")
    splits = load_coco(yolo(tmp_path / "c") / "data.yaml", cache_dir=tmp_path / "cache")
    assert list(splits) == list(load_coco(tmp_path / "c", cache_dir=tmp_path / "cache"))
    with pytest.raises(DataError, match=r"expected a dataset folder, a COCO file or a data\.yaml"):
        load_coco(root / "images" / "00000000-photo_0.png")


def test_the_files_and_folders_taken_and_left_aside_are_logged_once(tmp_path, caplog):
    root = roboflow(tmp_path / "set")
    (root / "old.json").write_text(json.dumps(content()))
    (root / "test/_annotations.coco.json").rename(root / "test/notes.txt")
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_coco(root, cache_dir=tmp_path / "cache")
        load_coco(root, cache_dir=tmp_path / "cache")
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert text.count(f"dataset {root} (COCO):") == 1
    assert "train train/_annotations.coco.json, images in train" in text
    assert "valid valid/_annotations.coco.json, images in valid" in text
    assert "not used: old.json, test" in text


def test_a_yaml_that_names_no_images_is_refused(tmp_path):
    (tmp_path / "settings.yaml").write_text("a: 1")
    with pytest.raises(DataError, match=r"settings\.yaml: expected a data\.yaml with `names` and .*`train`"):
        load_coco(tmp_path / "settings.yaml")


def test_a_folder_of_links_that_are_read_is_not_called_unused(tmp_path):
    root = tmp_path / "set"
    names = [f"{k}.png" for k in range(5)]
    pictures(tmp_path / "store", names)
    (root / "images").mkdir(parents=True)
    for name in names:
        (root / "images" / name).symlink_to(tmp_path / "store" / name)
    (root / "annotations.json").write_text(json.dumps(coco(names)))
    assert "not used" not in examine(root, Settings(follow_links=True)).files
    assert examine(root).files.endswith("train annotations.json\n  not used: images"), "its folder isn't known"


def test_the_image_folder_that_was_used_is_named(tmp_path, caplog):
    root = label_studio(
        tmp_path / "set",
    )
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert "train result.json, images in images" in caplog.text


@pytest.mark.parametrize("kind", ["no images", "boxes", "no images of YOLO", "boxes of YOLO"])
def test_a_test_split_without_images_or_masks_is_left_out_with_its_reason(kind, tmp_path, caplog):
    if "YOLO" in kind:
        root, reason = yolo(tmp_path / "set"), "test: found no images"
        with (root / "data.yaml").open("a") as file:
            file.write("test: images/test\n")
        (root / "images/test").mkdir()
        if "boxes" in kind:
            pictures(root / "images/test", ["a.png"])
            (root / "labels/test").mkdir()
            (root / "labels/test/a.txt").write_text("0 0.5 0.5 0.2 0.2")
            reason = "labels/test: .*boxes only"
    else:
        root, reason = roboflow(tmp_path / "set"), "test/_annotations.coco.json: `images` is empty"
        path = root / "test/_annotations.coco.json"
        test = json.loads(path.read_text())
        if "boxes" in kind:
            test["annotations"] = [{**one, "segmentation": []} for one in test["annotations"]]
            reason = "test/_annotations.coco.json: annotation .*boxes only"
        path.write_text(json.dumps(test if "boxes" in kind else {**test, "images": [], "annotations": []}))
    for _ in range(2):  # the second time from the cache
        assert list(load_coco(root, cache_dir=tmp_path / "cache")) == ["train", "valid"]
        with pytest.raises(DataError, match=reason):
            load_coco(root, cache_dir=tmp_path / "cache", required="test")
    assert "The test split is left out" in caplog.text
    examination = examine(root)
    assert (examination.status, list(examination.scans)) == (0, ["train", "valid"])
    (warning,) = [one for one in examination.findings if one.kind == "test-left-out"]
    assert re.search(f"The test split is left out\\. .*{reason}", warning.message)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_empty_split_that_training_needs_is_refused(split, tmp_path):
    root = roboflow(tmp_path / "set")
    path = root / split / "_annotations.coco.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": [], "annotations": []}))
    with pytest.raises(DataError, match=f"{split}/_annotations.coco.json: `images` is empty"):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert examine(root).findings[0].kind == "unusable"


def test_image_folders_can_be_given_without_annotations(tmp_path):
    root = train_and_val_files_in_the_folder(tmp_path / "set")
    (root / "images").rename(root / "elsewhere")
    layout = find_splits(root, images={"train": "elsewhere", "val": "elsewhere"})
    assert {files.image_folders for files in layout.splits} == {(root / "elsewhere",)}
    with pytest.raises(DataError, match="expected one of the splits train, valid"):
        find_splits(root, images={"test": "elsewhere"})
    with pytest.raises(DataError, match="expected the image folder of split 'train', found nothing"):
        find_splits(root, images={"train": "nowhere"})


OTHERS = {
    "COCO panoptic": ("annotations/panoptic_val2017.json", {**content(), "segments_info": []}),
    "VGG Image Annotator project": ("a/via.json", {"a.png1": {"regions": [{"shape_attributes": {}}]}}),
    "Supervisely": ("ds/ann/a.png.json", {"objects": [{"classTitle": "cell"}]}),
    "Datumaro": ("annotations/default.json", {"items": [], "categories": {}, "infos": {}}),
    "SA-1B": ("sa_1.json", {"image": {}, "annotations": [{"segmentation": {}}]}),
    "Label Studio JSON": ("export.json", [{"annotations": [{"result": [{"from_name": "label"}]}]}]),
    "Labelbox": ("export.json", [{"data_row": {}, "projects": {}}]),
    "FiftyOne's own format": ("samples.json", {"samples": [{"_cls": "Detection"}]}),
    "COCO captions": ("captions.json", {"images": [], "annotations": [{"caption": "a"}]}),
    "COCO images without annotations": ("annotations/image_info_x.json", {"images": [], "categories": []}),
    "Pascal VOC": ("Annotations/a.xml", "<annotation><object/></annotation>"),
    "imagefolder without objects": ("train/metadata.jsonl", '{"file_name": "a.png", "text": "a cell"}'),
    "datasets.save_to_disk": ("dataset_dict.json", {"splits": ["train"]}),
    "datasets.Dataset.save_to_disk": ("data-00000-of-00001.arrow", ""),
    "DOTA": ("train/labelTxt/a.txt", "imagesource:GoogleEarth"),
    "archive": ("export.zip", "PK"),
    "CVAT for images": ("annotations.xml", "<?xml version='1.0'?>\n<annotations><version/></annotations>"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_refused_by_name_with_what_converts_them(name, tmp_path):
    file, value = OTHERS[name]
    path = tmp_path / "set" / file
    path.parent.mkdir(parents=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(DataError, match=rf"its format is {name}, which is not read\. \w+.*") as error:
        find_splits(tmp_path / "set")
    assert OTHER_FORMATS[name] in str(error.value)
    assert str(tmp_path / "set") in str(error.value)


def test_images_of_segments_below_annotations_are_no_masks_of_objects(tmp_path):
    pictures(tmp_path / "set", ["val2017/a.png", "annotations/panoptic_val2017/a.png"])
    (tmp_path / "set/annotations/panoptic_val2017.json").write_text(json.dumps(OTHERS["COCO panoptic"][1]))
    with pytest.raises(DataError, match="its format is COCO panoptic"):
        find_splits(tmp_path / "set")


def test_an_archive_is_refused_with_the_advice_to_unpack_it(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match=r"archive, which is not read\. Unpack it"):
        find_splits(tmp_path / "a.zip")


def test_vgg_coco_is_read_beside_any_other_file(tmp_path):
    root = vgg(tmp_path / "set")
    (root / "attributes.json").write_text("{}")
    (files,) = find_splits(root).splits
    assert files.annotations.name == "via_project_22Nov2026_12h0m_coco.json"


def test_given_annotations_hold_out_validation_images_like_found_ones(tmp_path):
    root = label_studio(tmp_path / "set")
    splits = load_dataset(root, ["train=result.json"], ["train=."])
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 5, "valid": 1}
    with pytest.raises(DataError, match="this is a Hub dataset"):
        load_dataset("user/name", ["train=result.json"])


@pytest.mark.parametrize("tool", ["ultralytics", "labelme", "datumaro", "hugging face imagefolder", "supervisely"])
def test_nothing_that_is_used_is_described_as_left_aside(tool, tmp_path):
    text = examine(EXPORTS[tool](tmp_path / "set")).files
    assert text.startswith(f"dataset {tmp_path / 'set'} (")
    assert "not used" not in text


def test_folders_whose_images_are_not_used_are_left_aside(tmp_path):
    root = masked(tmp_path / "set", (3, 4), "train/images/{}.png", "train/masks/{}.png")
    pictures(root / "test/images", ["x.png"])
    assert examine(root).files.endswith("images in train/images\n  not used: test")
