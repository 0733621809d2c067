"""Classes are matched by name across splits, regardless of ids; a corrected copy changes no class."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.categories import match_categories
from m2f_trainer.data.dataset import Category, categories_of, load_coco
from m2f_trainer.data.problems import Findings
from m2f_trainer.data.splits import FolderSplit
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.errors import DataError
from tests.data.folders import annotation, content, write

SETTINGS = Settings(64, 64)


def two_splits(root, train, valid):
    """Splits with these category names by id; a tuple (name,) adds no annotation."""
    for shade, (split, names) in enumerate({"train": train, "valid": valid}.items()):
        categories = [{"id": key, "name": name} for key, name in names if isinstance(name, str)]
        categories += [{"id": key, "name": name[0]} for key, name in names if isinstance(name, tuple)]
        names = [(key, name) for key, name in names if isinstance(name, str)]
        # an object as wide as its name is long tells its class
        objects = [
            annotation(k, category_id=key, segmentation=[[1, 3, right, 3, right, 11, 1, 11]], bbox=None)
            for k, (key, right) in enumerate((key, 1 + 2 * len(name.strip())) for key, name in names)
        ]
        write(root, content(*objects, categories=categories), split=split)
        values = np.random.default_rng(shade).integers(0, 255, size=(16, 20), dtype=np.uint8)
        Image.fromarray(values).save(root / split / "a.png")
    return root


def classes(root, tmp_path):
    """Split -> (name, width) of every object."""
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    names = {one.id: one.name.strip() for one in categories_of(splits["train"])}
    return {
        split: sorted((names[one["category_id"]], one["bbox"][2]) for row in rows for one in row["objects"])
        for split, rows in splits.items()
    }


SAME = {
    "swapped ids": ([(0, "cat"), (1, "horse")], [(0, "horse"), (1, "cat")]),
    "one class, two ids": ([(0, "cat")], [(1, "cat")]),
    "rotated": ([(1, "ox"), (2, "cat"), (3, "lion")], [(2, "ox"), (3, "cat"), (1, "lion")]),
    "spaces around a name": ([(0, "cat"), (1, "lion")], [(1, " cat "), (0, "lion")]),
    "a new class takes a free id": ([(0, "cat"), (1, "lion")], [(0, "ox"), (1, "cat"), (2, "lion")]),
    "an unused category under a used id": ([(1, "cat"), (2, "lion")], [(1, "lion"), (2, ("cow",)), (3, "cat")]),
    "an unused name for the id": ([(1, "cat"), (2, "lion")], [(1, "cat"), (2, ("tiger",))]),
    "the super-category has the name": ([(0, ("cat",)), (1, "cat")], [(0, "cat")]),
}


@pytest.mark.parametrize("case", SAME)
def test_objects_keep_their_class_by_name_in_training_and_in_the_copy(case, tmp_path):
    train, valid = SAME[case]
    root = two_splits(tmp_path / "set", train, valid)
    expected = {
        split: sorted((name.strip(), 2.0 * len(name.strip())) for _, name in names if isinstance(name, str))
        for split, names in {"train": train, "valid": valid}.items()
    }
    assert classes(root, tmp_path) == expected
    examination = examine(root, SETTINGS)
    assert examination.status == 0
    repair(examination, tmp_path / "copy")
    assert classes(tmp_path / "copy", tmp_path) == expected
    written = [json.loads(path.read_text())["categories"] for path in (tmp_path / "copy").glob("*/_anno*")]
    assert written[0] == written[1]


def test_the_ids_are_those_of_the_training_split_and_the_change_is_reported(tmp_path, caplog):
    root = two_splits(tmp_path / "set", [(0, "cat"), (1, "horse")], [(0, "horse"), (1, "cat")])
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert categories_of(splits["valid"]) == (Category(0, "cat"), Category(1, "horse"))
    assert "category id that differs between splits (2)" in caplog.text
    (note,) = [one for one in examine(root, SETTINGS).findings if one.kind != "area-mismatch"]
    assert (note.kind, note.severity, note.ids) == ("renumbered-category", "note", [0, 1])


def test_names_that_differ_in_case_are_one_class_with_a_warning(tmp_path):
    root = two_splits(tmp_path / "set", [(0, "cat"), (1, "Lion")], [(4, "CAT"), (1, "Lion")])
    assert [name for name, _ in classes(root, tmp_path)["valid"]] == ["Lion", "cat"]
    assert "category-case" in {one.kind for one in examine(root, SETTINGS).findings}


def test_thousands_of_classes_take_no_time(tmp_path):
    """A search of all names for each name takes over 10 seconds."""
    count = 4000
    entry = annotation(1, image_id=1)
    first, second = (
        FolderSplit(
            split,
            ({"id": 1, "file_name": "a.png", "height": 16, "width": 20},),
            {1: [{**entry, "category_id": key} for key in range(count)]},
            {key: f"class {count - 1 - key if turned else key}" for key in range(count)},
            tmp_path,
        )
        for split, turned in (("train", False), ("valid", True))
    )
    start = time.process_time()
    matched, names = match_categories({"train": first, "valid": second}, Findings())
    assert time.process_time() - start < 2
    assert names == {key: f"class {key}" for key in range(count)}
    assert [one["category_id"] for one in matched["valid"].annotations[1]] == list(range(count))[::-1]


def test_names_that_differ_in_case_within_a_split_are_two_classes_everywhere(tmp_path):
    root = two_splits(tmp_path / "set", [(0, "cat"), (1, "CAT")], [(1, "cat"), (0, "CAT")])
    assert [name for name, _ in classes(root, tmp_path)["valid"]] == ["CAT", "cat"]


def test_one_name_for_two_used_ids_of_a_split_is_refused(tmp_path):
    root = two_splits(tmp_path / "set", [(0, "cat"), (1, "cat")], [(0, "cat")])
    with pytest.raises(DataError, match=r"train.*categories 0, 1 are all named 'cat'. Give each its own name"):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert [one.kind for one in examine(root, SETTINGS).findings if one.severity == "error"] == [
        "repeated-category-name"
    ]


@pytest.mark.parametrize("valid", [[(0, "tiger"), (1, "lion")], [(1, "tiger")]])
def test_a_class_that_may_be_renamed_is_not_guessed(valid, tmp_path):
    root = two_splits(tmp_path / "set", [(0, "cat"), (1, "ox")], valid)
    with pytest.raises(DataError, match=r"is '(cat|ox)' in .*train.* but '(tiger|lion)' in .*valid"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_two_names_for_one_used_id_of_a_file_are_refused_and_left_to_a_person(tmp_path):
    root = two_splits(tmp_path / "set", [(0, "cat")], [(0, "cat"), (0, ("dog",))])
    with pytest.raises(DataError, match=r"category 0 is named both 'cat' and 'dog'"):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert examine(root, SETTINGS).status == 1


def test_two_names_for_an_id_that_nothing_uses_stop_nothing(tmp_path):
    root = two_splits(tmp_path / "set", [(0, "cat")], [(0, "cat"), (7, ("dog",)), (7, ("ox",))])
    assert len(load_coco(root, cache_dir=tmp_path / "cache")) == 2
