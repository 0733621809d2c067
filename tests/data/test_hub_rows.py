"""Malformed rows of Hub datasets: training refuses them with row and remedy, m2f check reports all."""

import io
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import List, Value
from PIL import Image

from m2f_trainer.data.dataset import Category, categories_of, load_coco, row_features
from m2f_trainer.data.hub_dataset import load_dataset, load_hub, read_hub
from m2f_trainer.data.problems import Findings
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.doctor.page import render
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.errors import DataError
from tests.data.folders import SQUARE
from tests.data.test_hub_dataset import as_pushed


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is left in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


LABEL = datasets.ClassLabel(names=["cat", "dog"])
POLYGONS = List(List(Value("float64")))
FIELDS = {"category": LABEL, "segmentation": POLYGONS, "bbox": List(Value("float64")), "area": Value("float64")}
OBJECT = {"category": 1, "segmentation": SQUARE, "bbox": [2.0, 3.0, 10.0, 8.0], "area": 80.0, "iscrowd": 0}


def picture(number: int = 0) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 255, size=(4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((20, 16), Image.Resampling.NEAREST)


def foreign(folder, *rows, **features):
    """A set of another's making: one sound row in each split, and `rows` after the first in train."""
    fields = List({**FIELDS, "iscrowd": Value("int64"), **features.pop("fields", {})})
    made = datasets.Features({"image": datasets.Image(), "objects": fields, **features})
    base = dict.fromkeys(made)
    one = {key: value for key, value in OBJECT.items() if features.get("objects") is None}
    sound = [{**base, "image": picture(k), "objects": [one]} for k in range(2)]
    splits = {"train": [sound[0], *({**base, "image": picture(9), **row} for row in rows)], "valid": sound[1:]}
    parts = {split: datasets.Dataset.from_list(found, features=made) for split, found in splits.items()}
    return as_pushed(datasets.DatasetDict(parts), folder)


def wrong(**changes):
    return {"objects": [OBJECT, {**OBJECT, **changes}]}


FAULTS = {
    "box of three": ("bad-box", wrong(bbox=[1.0, 2.0, 3.0]), {}, "row 1, object 1: expected a `bbox` of four.*Correct"),
    "box with NaN": ("bad-box", wrong(bbox=[1.0, 2.0, float("nan"), 4.0]), {}, "row 1, object 1: expected a `bbox`"),
    "area below 0": ("bad-area", wrong(area=-5.0), {}, "row 1, object 1: expected an `area` in pixels, got -5"),
    "category null": ("bad-annotation-entry", wrong(category=None), {}, "row 1, object 1: .*category None. Add"),
    "category unnamed": ("unknown-category", wrong(category=-1), {}, "row 1, object 1: category -1 isn't one of.*0, 1"),
    "crowd of two": ("bad-crowd", wrong(iscrowd=2), {}, "row 1, object 1: expected an `iscrowd` of 0 or 1, got 2"),
    "no polygon": ("bad-mask", wrong(segmentation=[[1.0, 2.0]]), {}, "row 1, object 1.*at least three points"),
    "no mask": ("no-mask", wrong(segmentation=None), {}, "row 1, object 1.*expected polygons"),
    "objects null": ("bad-annotation-entry", {"objects": None}, {}, "row 1: expected a list as objects, got a null"),
    "object null": ("bad-annotation-entry", {"objects": [None]}, {}, "row 1, object 0: expected an object, got a null"),
    "image null": ("bad-image", {"image": None, "objects": []}, {}, "row 1: expected an image with 'path' or 'bytes'"),
    "id twice": (
        "duplicate-image-id",
        {"image_id": 0, "objects": []},
        {"image_id": Value("int64")},
        "row 1: image_id 0 is used twice. Renumber",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_malformed_value_is_refused_by_training_and_reported_by_check(name, tmp_path):
    kind, row, features, message = FAULTS[name]
    folder = foreign(tmp_path / "set", row, **features)
    with pytest.raises(DataError, match=message):
        load_hub(folder, cache_dir=str(tmp_path / "cache"))
    examination = examine(folder, Settings(64, 64))
    found = {finding.kind: finding for finding in examination.findings if finding.severity == "error"}
    assert list(found) == [kind]
    assert found[kind].count == 1
    assert found[kind].file == f"{folder}, split 'train'"
    assert len(examination.scans["train"]) == 2 - (kind in ("bad-image", "duplicate-image-id"))
    assert examination.status == 1


def test_lists_of_unequal_length_are_refused(tmp_path):
    fields = {"category": List(Value("int64")), "segmentation": List(POLYGONS)}
    features = datasets.Features({"image": datasets.Image(), "objects": fields})
    row = {"image": picture(), "objects": {"category": [1, 1], "segmentation": [SQUARE]}}
    rows = datasets.Dataset.from_list([row], features=features)
    with pytest.raises(DataError, match=r"row 0: expected one value of each field.*got 2 category, 1 segmentation"):
        load_hub(as_pushed(datasets.DatasetDict({"train": rows}), tmp_path / "uneven"))


def named(folder, train, valid):
    """A set of another's making whose categories are names; the names of the only object in each row."""
    fields = {"category": List(Value("string")), "segmentation": List(POLYGONS)}
    features = datasets.Features({"image": datasets.Image(), "objects": fields})
    rows = {
        split: [{"image": picture(k), "objects": {"category": [name], "segmentation": [SQUARE]}} for k, name in names]
        for split, names in {"train": enumerate(train), "valid": enumerate(valid, start=len(train))}.items()
    }
    parts = {split: datasets.Dataset.from_list(found, features=features) for split, found in rows.items()}
    return as_pushed(datasets.DatasetDict(parts), folder)


def test_categories_given_by_name_are_numbered_in_the_order_of_the_names(tmp_path):
    folder = named(tmp_path / "set", train=["nucleus", "cell"], valid=["debris", "nucleus"])
    splits = load_hub(folder)
    classes = (Category(1, "cell"), Category(2, "debris"), Category(3, "nucleus"))
    assert [categories_of(rows) for rows in splits.values()] == [classes, classes]
    found = {split: [row["objects"][0]["category_id"] for row in rows] for split, rows in splits.items()}
    assert found == {"train": [3, 1], "valid": [2, 3]}
    examination = examine(folder, Settings(64, 64))
    assert not [one.message for one in examination.findings if one.severity == "error"]
    with pytest.raises(DataError, match=r"row 1, object 0: expected a whole number or a name .* got category None"):
        load_hub(named(tmp_path / "null", train=["cell", None], valid=["cell"]))


def test_objects_of_which_some_have_a_number_and_some_only_a_name_are_refused(tmp_path):
    fields = List({"category_id": Value("int64"), "category": Value("string"), "segmentation": POLYGONS})
    objects = [{"category_id": 3, "category": None}, {"category_id": None, "category": "dog"}]
    row = {"image": picture(), "objects": [{**one, "segmentation": SQUARE} for one in objects]}
    features = datasets.Features({"image": datasets.Image(), "objects": fields})
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([row], features=features)})
    with pytest.raises(DataError, match="a number as category, such as 3, and others only a name, such as 'dog'"):
        load_hub(as_pushed(splits, tmp_path / "mixed"))


@pytest.mark.parametrize("other", [LABEL, Value("string")], ids=["ClassLabel", "names"])
def test_a_number_beside_a_class_with_a_name_is_not_taken_for_that_of_the_class(other, tmp_path):
    """COCO's category ids start at 1, the numbers of a ClassLabel at 0."""
    fields = List({"category_id": Value("int64"), "label": other, "segmentation": POLYGONS})
    rows = [
        {"image": picture(k), "objects": [{"category_id": number, "label": label, "segmentation": SQUARE}]}
        for k, (number, label) in enumerate([(1, "cat"), (2, "dog"), (2, "dog")])
    ]
    features = datasets.Features({"image": datasets.Image(), "objects": fields})
    parts = {"train": datasets.Dataset.from_list(rows, features=features)}
    folder = as_pushed(datasets.DatasetDict({**parts, "valid": parts["train"]}), tmp_path / "set")
    splits = load_hub(folder)
    for split in splits.values():
        names = {one.id: one.name for one in categories_of(split)}
        assert [names[row["objects"][0]["category_id"]] for row in split] == ["cat", "dog", "dog"]
    scans = examine(folder, Settings(64, 64)).scans["train"]
    classes = [scan.split.categories[one["category_id"]] for scan in scans for one in scan.objects]
    assert classes == ["cat", "dog", "dog"]


def test_rows_of_ours_whose_objects_were_given_names_keep_their_classes(tmp_path):
    rows = load_coco(write_sample(tmp_path / "sample", images=(4, 2, 0)))["train"]
    names = {one.id: one.name for one in categories_of(rows)}

    def named(row):
        return {"objects": [{"category": names[one["category_id"]], "counts": one["counts"]} for one in row["objects"]]}

    fields = {**rows.features, "objects": List({"category": Value("string"), "counts": Value("string")})}
    changed = rows.map(named, features=datasets.Features(fields))
    split = load_hub(as_pushed(datasets.DatasetDict({"train": changed, "valid": changed}), tmp_path / "set"))["train"]
    found = {one.id: one.name for one in categories_of(split)}
    expected = [[names[one["category_id"]] for one in row["objects"]] for row in rows]
    assert [[found[one["category_id"]] for one in row["objects"]] for row in split] == expected


@pytest.mark.parametrize("label", ["", "occluded"])
def test_numbers_of_all_objects_count_before_a_text_of_some(label, tmp_path):
    fields = List({"category_id": Value("int64"), "label": Value("string"), "segmentation": POLYGONS})
    rows = [
        {"image": picture(k), "objects": [{"category_id": k + 1, "label": text, "segmentation": SQUARE}]}
        for k, text in enumerate([label, None])
    ]
    features = datasets.Features({"image": datasets.Image(), "objects": fields})
    parts = {"train": datasets.Dataset.from_list(rows, features=features)}
    split = load_hub(as_pushed(datasets.DatasetDict({**parts, "valid": parts["train"]}), tmp_path / "set"))["train"]
    assert [(one.id, one.name) for one in categories_of(split)] == [(1, "1"), (2, "2")]
    assert [row["objects"][0]["category_id"] for row in split] == [1, 2]


@pytest.mark.parametrize("whole", [True, False], ids=["splits", "one split"])
def test_a_folder_of_save_to_disk_is_refused_with_a_way_out_that_works(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = datasets.load_dataset(named(tmp_path / "set", train=["cell", "nucleus"], valid=["cell"]))
    (pushed if whole else pushed["train"]).save_to_disk("FOLDER")
    format_name = r"datasets\.(Dataset\.)?save_to_disk"
    with pytest.raises(DataError, match=rf"its format is {format_name}.*`(.*)`; or upload it") as error:
        load_dataset("FOLDER")
    Path("as_parquet").mkdir()
    exec(re.search("`(.*)`", str(error.value))[1], {"datasets": datasets})
    found = {split: len(rows) for split, rows in load_hub("as_parquet").items()}
    assert found == ({"train": 2, "valid": 1} if whole else {"train": 2})


OURS = {
    "bbox": (None, "expected a value for bbox, got null"),
    "iscrowd": (None, "expected a value for iscrowd, got null"),
    "category_id": (7, "category 7 isn't one of the named ones: 5"),
    "area": (float("nan"), "expected an `area` in pixels, got nan"),
    "counts": ("52203", "annotation 3 of image 0.*row|RLE|runs"),
}


@pytest.mark.parametrize("field", OURS)
def test_an_uploaded_set_of_ours_that_was_changed_is_refused(field, tmp_path):
    value, message = OURS[field]
    one = {"id": 3, "category_id": 5, "bbox": [2.0, 3.0, 10.0, 8.0], "area": 80.0, "iscrowd": False}
    whole = load_coco(write_sample(tmp_path / "set", images=(1, 0, 0)), cache_dir=tmp_path / "coco")["train"]
    counts = whole[0]["objects"][0]["counts"]
    row = {key: whole[0][key] for key in ("image", "height", "width", "displayed", "pixel_range")}
    row |= {"image_id": 0, "categories": None, "objects": [{**one, "counts": counts, field: value}]}
    rows = datasets.Dataset.from_list([row], features=row_features([Category(5, "cell")]))
    folder = as_pushed(datasets.DatasetDict({"train": rows, "valid": rows}), tmp_path / "pushed")
    with pytest.raises(DataError, match=message):
        load_hub(folder, cache_dir=str(tmp_path / "cache"))
    reported = [one for one in examine(folder).findings if one.severity == "error" and one.kind != "no-objects"]
    assert len({one.kind for one in reported}) == 1
    assert any(part in reported[0].message for part in (message, "annotation 3 of image 0"))


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_a_photo_that_viewers_turn_needs_the_frame_of_its_objects(orientation, tmp_path):
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture(9).save(data, "PNG", exif=exif)
    photo = {"bytes": data.getvalue(), "path": None}
    folder = foreign(tmp_path / "set", {"image": photo, "objects": [OBJECT]})
    with pytest.raises(DataError, match=r"row 1: viewers turn this photo .* Give --exif_frame displayed"):
        load_hub(folder)
    assert "exif-frame" in {one.kind for one in examine(folder, Settings(64, 64)).findings}
    assert load_hub(folder, exif_frame="displayed")["train"]["displayed"][:] == [True, True]
    if orientation < 5:
        folder = foreign(tmp_path / "empty", {"image": photo, "objects": []})
        assert len(load_hub(folder)["train"]) == 2


def test_a_column_of_categories_alone_does_not_make_a_set_ours(tmp_path):
    folder = foreign(tmp_path / "set", categories=datasets.ClassLabel(names=["indoor", "outdoor"]))
    assert [len(rows) for rows in load_hub(folder).values()] == [1, 1]


def test_the_doctor_sees_in_polygons_of_the_hub_what_it_sees_in_those_of_a_folder(tmp_path):
    crossing = [[2.0, 3.0, 12.0, 11.0, 12.0, 3.0, 2.0, 11.0]]
    folder = foreign(tmp_path / "set", wrong(segmentation=crossing, area=40.0))
    reported = {one.kind: one for one in examine(folder, Settings(64, 64)).findings}
    assert "row 1, object 1: two edges of its polygon cross" in reported["self-intersection"].message


def test_images_of_the_hub_are_read_when_looked_at_and_not_kept(tmp_path, monkeypatch):
    splits = load_coco(write_sample(tmp_path / "set", images=(90, 3, 0)), cache_dir=tmp_path / "coco")
    folder = as_pushed(splits, tmp_path / "pushed")
    report = Findings()
    files = read_hub(folder, report, cache_dir=str(tmp_path / "cache"))
    held = []
    source = type(files["train"]).source
    monkeypatch.setattr(
        type(files["train"]), "source", lambda self, image: held.append(image["id"]) or source(self, image)
    )
    monkeypatch.setattr("m2f_trainer.doctor.examine.read_hub", lambda name, report, exif_frame: files)
    examination = examine(folder, Settings(64, 64))
    assert len(held) == 93 * 2  # header, then pixels
    assert not any("source" in vars(scan) for scan in examination.scans["train"])
    render(examination)
    assert len(held) == 93 * 2 + 24  # the pictures of the page are read again
    repair(examination, tmp_path / "copy")
    assert examine(tmp_path / "copy").status == 0
