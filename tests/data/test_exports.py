"""Exports of annotation tools, untouched: loaded with the right masks, or corrected by the one command named."""

import json
import logging
import re

import datasets
import numpy as np
import pytest

from m2f_trainer.data.dataset import categories_of, held_out, load_coco
from m2f_trainer.data.hub_dataset import load_hub
from m2f_trainer.data.validate import check_dataset
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.doctor.summary import summary_text
from m2f_trainer.errors import DataError
from m2f_trainer.masks import segmentation as masks
from tests.data.exports import EXPORTS, label_studio, pictures, vgg_own
from tests.data.folders import annotation, content, write
from tests.data.test_hub_dataset import as_pushed

SETTINGS = Settings(64, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is left in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


CORRECTED = {name for name in EXPORTS if name.startswith("label studio ")} - {"label studio on windows"} | {
    "cvat brush"
}


WITH_VALID = {"train and val files in the folder", "fiftyone", "fiftyone with labels apart", "datumaro"} | {
    "ultralytics",
    "hugging face imagefolder",
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_an_untouched_export_trains_with_its_masks_or_after_the_fix(tool, tmp_path):
    root = EXPORTS[tool](tmp_path / "set")
    if tool in CORRECTED:
        with pytest.raises(DataError, match=r"write 'images/.*\.png'|m2f check --fix"):
            check_dataset(load_coco(root, cache_dir=tmp_path / "refused"))
        assert examine(root, SETTINGS).status == 1
        repair(examine(root, SETTINGS), tmp_path / "corrected")
        root = tmp_path / "corrected"
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    check_dataset(splits)
    square = np.zeros((16, 20), dtype=np.uint8)
    square[3:11, 2:12] = 1
    for rows in splits.values():
        assert [one.name for one in categories_of(rows)] == ["cell"]
        for row in rows:
            (one,) = row["objects"]
            assert np.array_equal(masks.decode(one["counts"], 16, 20), square)
            assert not one["iscrowd"]
            assert (one["bbox"], one["area"]) == ([2, 3, 10, 8], 80)
    assert min(map(len, splits.values())) > 0
    assert examine(root, SETTINGS).status == 0


@pytest.mark.parametrize("tool", EXPORTS)
def test_the_doctor_reports_nothing_of_an_export_but_what_is_special_to_its_tool(tool, tmp_path):
    if tool in CORRECTED:
        kinds = {"brush-crowd", "no-objects", "held-out"} if tool == "cvat brush" else {"unsafe-path", "held-out"}
    else:
        special = {"roboflow": {"unused-category"}, "label studio on windows": {"found-image", "held-out"}}
        kinds = special.get(tool, set() if tool in WITH_VALID else {"held-out"})
    examination = examine(EXPORTS[tool](tmp_path), SETTINGS)
    assert {one.kind for one in examination.findings} - {"missing-class"} == kinds
    assert sum(map(len, examination.scans.values())) >= 5


def test_training_logs_how_many_brush_masks_of_cvat_it_leaves_out(tmp_path, caplog):
    root = EXPORTS["cvat brush"](tmp_path / "set")
    (file,) = (root / "annotations").glob("*.json")
    coco = json.loads(file.read_text())
    for one in coco["annotations"][3:]:
        one["iscrowd"] = 0
    file.write_text(json.dumps(coco))
    load_coco(root, cache_dir=tmp_path / "cache")
    log = r"crowd region \(3\), the first: .*annotation 1 .*set its `iscrowd` to 0, as m2f check --fix"
    assert re.search(log, caplog.text)
    (finding,) = [one for one in examine(root, SETTINGS).findings if one.kind == "brush-crowd"]
    assert sorted(finding.ids) == [1, 2, 3]


def test_a_fifth_is_held_out_by_name_whatever_the_order_and_named_in_a_warning(tmp_path, caplog):
    names = [f"{k}.png" for k in range(50)]
    chosen = {names[place] for place in held_out(names)}
    assert len(chosen) == 10
    assert {names[::-1][place] for place in held_out(names[::-1])} == chosen
    more = [*names, "x.png", "y.png"]
    assert {more[place] for place in held_out(more)} - chosen <= {"x.png", "y.png"}
    with caplog.at_level(logging.WARNING):
        splits = load_coco(label_studio(tmp_path / "set"), cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 5, "valid": 1}
    assert "has no validation split: 1 of its 6 training images" in caplog.text
    seen = [scan.entry["id"] for scan in examine(tmp_path / "set", SETTINGS).scans["valid"]]
    assert seen == splits["valid"]["image_id"][:]


def test_fewer_than_five_images_are_not_split_and_the_advice_says_so(tmp_path):
    root = label_studio(tmp_path / "set")
    found = json.loads((root / "result.json").read_text())
    few = {**found, "images": found["images"][:4], "annotations": found["annotations"][:4]}
    (root / "result.json").write_text(json.dumps(few))
    with pytest.raises(DataError, match=r"expected a split 'valid'.*of at least five, a fifth is held out"):
        check_dataset(load_coco(root, cache_dir=tmp_path / "cache"))
    assert [one.kind for one in examine(root, SETTINGS).findings] == ["missing-split"]


def test_nothing_is_held_out_of_given_splits(tmp_path):
    root = label_studio(tmp_path / "set")
    splits = load_coco(root, cache_dir=tmp_path / "cache", annotations={"train": "result.json"})
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6}


def test_a_hub_set_without_validation_has_the_same_images_held_out_for_training_and_doctor(tmp_path):
    whole = load_coco(label_studio(tmp_path / "set"), cache_dir=tmp_path / "c", annotations={"train": "result.json"})
    folder = as_pushed(datasets.DatasetDict(whole), tmp_path / "pushed")
    splits = load_hub(folder, cache_dir=str(tmp_path / "cache"))
    check_dataset(splits)
    assert sorted(splits["train"]["image_id"][:] + splits["valid"]["image_id"][:]) == list(range(6))
    undivided = load_hub(folder, hold_out=False, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in undivided.items()} == {"train": 6}
    seen = examine(folder, SETTINGS).scans
    assert [scan.entry["id"] for scan in seen["valid"]] == splits["valid"]["image_id"][:]


def test_a_project_file_that_is_no_coco_is_refused_with_what_to_export(tmp_path):
    with pytest.raises(
        DataError, match=r"via_region_data\.json: its format is VGG Image Annotator project.*COCO format"
    ):
        load_coco(vgg_own(tmp_path / "set"), cache_dir=tmp_path / "cache")


def test_boxes_without_outlines_are_refused_and_left_out_by_the_fix(tmp_path):
    """What Label Studio, CVAT and Roboflow write of a rectangle."""
    pictures(tmp_path / "set/valid", ["a.png"])
    write(tmp_path / "set", content(), split="valid")
    root = write(tmp_path / "set", content(annotation(1), annotation(2, segmentation=[])))
    with pytest.raises(DataError, match=r"annotation 2 .*segmentation is empty. Add the polygon"):
        load_coco(root, cache_dir=tmp_path / "cache")
    (error,) = [one for one in examine(root, SETTINGS).findings if one.severity == "error"]
    text = summary_text(examine(root, SETTINGS))
    assert (error.kind, error.ids) == ("no-mask", [2])
    assert "an object without a mask is learnt as background" in text
    assert "leave out its image" in text
    assert "pycocotools" not in text
    changes = repair(examine(root, SETTINGS), tmp_path / "corrected").changes
    (change,) = [one for one in changes if one["finding"] == "no-mask"]
    assert change["id"] == 2
    assert change["change"] == "removed: the object becomes background"


def test_a_name_is_only_looked_for_inside_the_dataset(tmp_path):
    root = label_studio(tmp_path / "set")
    found = json.loads((root / "result.json").read_text())
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "images/link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", "..\\secret.png", "..\\link.png", "..", "a\0b.png", "\\"):
        found["images"][0]["file_name"] = name
        (root / "result.json").write_text(json.dumps(found))
        (one,) = [one for one in examine(root, SETTINGS).findings if one.severity == "error"]
        assert one.kind == "unsafe-path"
        assert re.search(r"(Correct the file name|Copy the file into the folder)\.$", one.message)
        assert 0 not in [scan.entry["id"] for scans in examine(root, SETTINGS).scans.values() for scan in scans]


def test_a_name_that_two_images_have_is_not_guessed(tmp_path):
    root = label_studio(tmp_path / "set")
    found = json.loads((root / "result.json").read_text())
    name = found["images"][0]["file_name"].removeprefix("images/")
    for place, folder in enumerate(("D:\\first", "D:\\second")):
        found["images"][place]["file_name"] = f"{folder}\\{name}"
    (root / "result.json").write_text(json.dumps(found))
    (one,) = [one for one in examine(root, SETTINGS).findings if one.severity == "error"]
    assert (one.kind, one.ids) == ("unsafe-path", [0, 1])
    assert "write" not in one.message
