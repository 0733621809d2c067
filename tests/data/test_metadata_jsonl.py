"""imagefolder datasets: metadata.jsonl with objects is read, in both spellings, with numbered or named categories."""

import json
import re

import pytest

from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.errors import DataError
from m2f_trainer.masks.segmentation import to_counts
from tests.data.exports import SQUARE, pictures

LISTS = {"bbox": [[2, 3, 10, 8]], "category": [3], "segmentation": [[SQUARE]], "area": [80]}


def imagefolder(root, *rows, names="abcdefgh"):
    pictures(root, [f"{name}.png" for name in names[: len(rows)]])
    lines = [json.dumps({"file_name": f"{name}.png", "objects": row}) for name, row in zip(names, rows, strict=False)]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return root


@pytest.mark.parametrize(
    ("objects", "name"),
    [
        (LISTS, "3"),
        ({**LISTS, "category": ["cell"]}, "cell"),
        ([{"label": "cell", "polygons": [SQUARE]}], "cell"),
        ([{"category_id": 3, "counts": to_counts([SQUARE], 16, 20, "")}], "3"),
    ],
)
def test_objects_are_read_in_every_spelling(objects, name, tmp_path):
    root = imagefolder(tmp_path / "set", objects, {} if isinstance(objects, dict) else [])
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert [[one["area"] for one in row["objects"]] for row in rows] == [[80], []]
    assert [one.name for one in categories_of(rows)] == [name]


def test_named_classes_are_numbered_over_all_splits(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    imagefolder(tmp_path / "set/train", {**LISTS, "category": ["spot"]}, {**LISTS, "category": ["cell"]})
    imagefolder(tmp_path / "set/validation", {**LISTS, "category": ["spot"]}, names="xyz")
    splits = load_dataset(tmp_path / "set")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2, "valid": 1}
    assert [(one.id, one.name) for one in categories_of(splits["valid"])] == [(1, "cell"), (2, "spot")]
    assert splits["valid"][0]["objects"][0]["category_id"] == 2
    assert splits["valid"][0]["image"]["path"].endswith("validation/x.png")


def test_numbered_categories_beside_named_ones_are_refused_with_line_and_object(tmp_path):
    """Number 1 would be the first class in the order of the names."""
    named = {**LISTS, "category": ["cell"]}
    imagefolder(tmp_path / "set/train", named, named)
    imagefolder(tmp_path / "set/valid", {**LISTS, "category": [1]}, names="xyz")
    message = r"metadata.jsonl, line 1, object 0: some objects have a number .* as 1, and others only .* as 'cell'\."
    with pytest.raises(DataError, match=message):
        load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert any(re.search(message, one.message) for one in examine(tmp_path / "set").findings)


@pytest.mark.parametrize("folders", [("train", "val"), ("Training", "test"), ("train", "validation")])
def test_one_file_is_split_by_the_folders_in_its_image_names(folders, tmp_path):
    root = tmp_path / "set"
    lines = []
    for folder, names in zip(folders, ("abc", "xy"), strict=True):
        pictures(root / folder, [f"{name}.png" for name in names])
        lines += [json.dumps({"file_name": f"{folder}/{name}.png", "objects": LISTS}) for name in names]
    (root / "metadata.jsonl").write_text("\n".join([lines[3], *lines[:3], lines[4]]))
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    second = "test" if "test" in folders else "valid"
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, second: 2}
    for split, folder in zip(("train", second), folders, strict=True):
        assert all(f"/{folder}/" in row["image"]["path"] for row in splits[split])
        assert all(len(row["objects"]) == 1 for row in splits[split])
    if second == "valid":
        assert {split: len(scans) for split, scans in examine(root).scans.items()} == {"train": 3, "valid": 2}


def test_an_image_outside_the_folders_of_splits_is_refused_beside_others(tmp_path):
    root = tmp_path / "set"
    names = ["train/a.png", "val/b.png", "c.png"]
    for name in names:
        pictures((root / name).parent, [(root / name).name])
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "objects": LISTS}) for name in names))
    with pytest.raises(DataError, match=r"some are not, such as 'c\.png'\. Move them into train, valid or test"):
        load_coco(root, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png", "x\\a.png"])
def test_images_outside_the_folder_are_refused(name, tmp_path):
    root = imagefolder(tmp_path / "set", LISTS)
    pictures(tmp_path, ["secret.png"])
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": name, "objects": LISTS}))
    with pytest.raises(DataError, match="file_name"):
        load_coco(root, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected an object with a `file_name`, got None"),
        ("[]", "line 2: expected an object with a `file_name`"),
        ('{"objects": []}', "line 2: expected an object with a `file_name`"),
        ('{"file_name": "gone.png", "objects": []}', "gone.png can't be read"),
        ('{"file_name": "a.png", "objects": {"category": [1, 2], "segmentation": []}}', "one value of each field"),
        ('{"file_name": "a.png", "objects": [{"segmentation": []}]}', "object 0: expected a category, got fields seg"),
        ('{"file_name": "a.png", "objects": [3]}', "object 0: expected a category, got a int"),
        ('{"file_name": "a.png", "objects": [{"label": 4, "iscrowd": 2}]}', "expected an `iscrowd` of 0 or 1"),
    ],
)
def test_a_faulty_line_is_refused_with_file_and_line(line, message, tmp_path):
    root = imagefolder(tmp_path / "set", LISTS)
    with (root / "metadata.jsonl").open("a") as file:
        file.write(line)
    (root / "metadata.jsonl").write_text((root / "metadata.jsonl").read_text().replace("\n\n", "\n"))
    with pytest.raises(DataError, match=message):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert examine(root).status


def test_boxes_without_masks_are_refused_as_such(tmp_path):
    boxes = {"bbox": [[2, 3, 10, 8]], "category": [0]}
    root = imagefolder(tmp_path / "set", boxes, boxes)
    with pytest.raises(DataError, match=r"in all 2 annotations: these are boxes only. Add outlines: .*SAM"):
        load_coco(root, cache_dir=tmp_path / "cache")
    (finding, *_) = examine(root).findings
    assert "boxes only" in finding.message


def test_lines_without_objects_are_images_without_objects(tmp_path):
    root = imagefolder(tmp_path / "set", LISTS, LISTS, LISTS, LISTS, LISTS)
    first, *others = (root / "metadata.jsonl").read_text().splitlines()
    (root / "metadata.jsonl").write_text(
        "\n".join(['{"file_name": "a.png"}', *others, first.replace("a.png", "f.png")])
    )
    pictures(root, ["f.png"])
    rows = load_coco(root, cache_dir=tmp_path / "cache", hold_out=False)["train"]
    assert [len(row["objects"]) for row in rows] == [0, 1, 1, 1, 1, 1]


def by_lines(root, *lines):
    """A metadata.jsonl of (image, x) in which each line has one square, which is moved by x."""
    root.mkdir(parents=True, exist_ok=True)
    square = [[[value + x * (k % 2 == 0) for k, value in enumerate(SQUARE)]] for _, x in lines]
    rows = [
        {"file_name": name, "objects": [{"label": "cell", "polygons": polygon}]}
        for (name, _), polygon in zip(lines, square, strict=True)
    ]
    pictures(root, sorted({name.removeprefix("./") for name, _ in lines}))
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_lines_of_one_image_are_one_image_with_all_their_objects(tmp_path, caplog):
    root = tmp_path / "set"
    by_lines(root / "train", ("a.png", 0), ("b.png", 0), ("./a.png", 5), ("a.png", 8))
    by_lines(root / "val", ("c.png", 0))
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    found = {row["image"]["path"][-5:]: [one["bbox"] for one in row["objects"]] for row in rows}
    assert len(rows) == 2
    assert found == {"a.png": [[x, 3, 10, 8] for x in (2, 7, 10)], "b.png": [[2, 3, 10, 8]]}
    assert "image listed more than once (2), the first: " in caplog.text
    assert "line 3: train/./a.png is the same file as image 1, train/a.png" in caplog.text
    examination = examine(root)
    notes = {one.kind: one.ids for one in examination.findings if one.severity == "note"}
    assert notes == {"merged-entries": ["metadata.jsonl:3", "metadata.jsonl:4"]}
    repair(examination, tmp_path / "copy")
    copy = load_coco(tmp_path / "copy", cache_dir=tmp_path / "cache")["train"]
    assert sorted(len(row["objects"]) for row in copy) == [1, 3]


def test_no_image_of_several_lines_is_both_trained_on_and_held_out(tmp_path):
    lines = [(f"{name}.png", x) for name in "abcdefghijkl" for x in (0, 4, 8)]
    splits = load_coco(by_lines(tmp_path / "set", *lines), cache_dir=tmp_path / "cache")
    train, valid = ({row["image"]["path"] for row in splits[name]} for name in ("train", "valid"))
    assert (len(train), len(valid)) == (10, 2)
    assert not train & valid


def test_the_objects_of_an_unreadable_image_are_counted(tmp_path):
    two = {key: value * 2 for key, value in LISTS.items()} | {"segmentation": [[SQUARE], [[0, 0, 5, 0, 5, 5]]]}
    for split, names in (("train", "abc"), ("val", "xy")):
        imagefolder(tmp_path / "set" / split, two, LISTS, *([LISTS] if split == "train" else []), names=names)
    (tmp_path / "set/train/a.png").write_bytes(b"")
    text = repair(examine(tmp_path / "set"), tmp_path / "copy").to_text()
    assert "train: 2 of 3 images, 2 of 4 objects" in text
    assert "left out: annotations 1, 2" in text


def test_a_metadata_file_without_objects_is_no_dataset(tmp_path):
    pictures(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}')
    with pytest.raises(DataError, match="imagefolder without objects"):
        load_coco(tmp_path)
