"""Unambiguous values are accepted in any notation and counted; ambiguous ones are refused."""

import json
import uuid

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.normalize import Ids, number, usual_box, usual_segmentation, whole_number
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.errors import DataError
from m2f_trainer.masks import segmentation as masks
from tests.data.honest import COUNTS, SQUARE, base, dataset, objects

SETTINGS = Settings(64, 64)


def every(key, **values):
    """A change that sets values of every entry of a list; a callable gets the entry."""

    def change(coco):
        for entry in coco[key]:
            for name, value in values.items():
                entry[name] = value(entry) if callable(value) else value

    return change


def without(key, *names):
    def change(coco):
        coco[key] = [{name: value for name, value in entry.items() if name not in names} for entry in coco[key]]

    return change


def all_ids(make):
    """A change of the image ids and of the references to them."""

    def change(coco):
        every("images", id=lambda one: make(one["id"]))(coco)
        every("annotations", image_id=lambda one: make(one["image_id"]))(coco)

    return change


def in_turn(*changes):
    return lambda coco: [change(coco) for change in changes]


def outline(value):
    return every("annotations", segmentation=value)


POINTS = [[2, 3], [12, 3], [12, 11], [2, 11]]
TURNED = masks.encode(masks.decode(masks.to_counts({"size": [16, 20], "counts": COUNTS}, 16, 20, ""), 16, 20).T)
STRING = masks.to_counts({"size": [16, 20], "counts": COUNTS}, 16, 20, "")
HONEST = {
    "no sizes": (without("images", "height", "width"), "size-from-file"),
    "no width": (without("images", "width"), "size-from-file"),
    "sizes of null": (every("images", height=None, width=None), "size-from-file"),
    "sizes of -1": (every("images", height=-1, width=-1), "size-from-file"),
    "sizes of 0": (every("images", height=0, width=0), "size-from-file"),
    "sizes as fractions": (every("images", height=16.0, width=20.0), "unusual-number"),
    "sizes as text": (every("images", height="16", width="20"), "unusual-number"),
    "ids as text": (all_ids("2019_{:06}".format), "unusual-id"),
    "ids as numerals": (all_ids(str), "unusual-id"),
    "ids with leading zeros": (all_ids("{:012}".format), "unusual-id"),
    "uuids": (all_ids(lambda k: str(uuid.UUID(int=k))), "unusual-id"),
    "ids beyond 64 bits": (all_ids(lambda k: 2**63 + k), "unusual-id"),
    "ids of 20 digits as text": (all_ids(lambda k: str(10**19 + k)), "unusual-id"),
    "numerals that refer to integers": (every("annotations", image_id=lambda one: str(one["image_id"])), "unusual-id"),
    "integers that refer to numerals": (every("images", id=lambda one: str(one["id"])), "unusual-id"),
    "integers that refer to 000001": (every("images", id=lambda one: f"{one['id']:06}"), "unusual-id"),
    "fractions that refer to integers": (
        every("annotations", image_id=lambda one: one["image_id"] + 0.0),
        "unusual-id",
    ),
    "category ids as text": (
        in_turn(every("categories", id="a"), every("annotations", category_id="a")),
        "unusual-id",
    ),
    "category 1.0": (every("annotations", category_id=1.0), "unusual-id"),
    "annotation ids as text": (every("annotations", id=lambda one: f"a{one['id']}"), "unusual-id"),
    "annotations without ids": (without("annotations", "id"), "missing-id"),
    "annotation ids of null": (every("annotations", id=None), "missing-id"),
    "a flat polygon": (outline(SQUARE), "unusual-outline"),
    "pairs": (outline(POINTS), "unusual-outline"),
    "pairs in a list": (outline([POINTS]), "unusual-outline"),
    "points with x and y": (outline([[{"x": x, "y": y} for x, y in POINTS]]), "unusual-outline"),
    "a polygon in one list more": (outline([[SQUARE]]), "unusual-outline"),
    "a polygon of numerals": (outline([[str(value) for value in SQUARE]]), "unusual-outline"),
    "a stray point": (outline([SQUARE, [10, 8]]), "stray-part"),
    "a stray point first": (outline([[10, 8], SQUARE]), "stray-part"),
    "a stray line": (outline([SQUARE, [10, 8, 12, 9]]), "stray-part"),
    "an empty part": (outline([SQUARE, []]), "stray-part"),
    "a null part": (outline([None, SQUARE]), "stray-part"),
    "rle of swapped size": (outline({"size": [20, 16], "counts": COUNTS}), "unusual-rle"),
    "compressed rle of swapped size": (outline({"size": [20, 16], "counts": STRING}), "unusual-rle"),
    "rle of the turned mask": (outline({"size": [20, 16], "counts": TURNED}), "unusual-rle"),
    "rle size as fractions": (outline({"size": ["16", 20.0], "counts": COUNTS}), "unusual-rle"),
    "counts as Python bytes": (outline({"size": [16, 20], "counts": str(STRING.encode())}), "unusual-rle"),
    "counts as fractions": (outline({"size": [16, 20], "counts": [float(run) for run in COUNTS]}), "unusual-rle"),
    "rle without a size": (outline({"counts": COUNTS}), "unusual-rle"),
    "a stray number": (outline([SQUARE, [10, 8, 11]]), "stray-part"),
    "a polygon as JSON text": (outline(json.dumps([SQUARE])), "unusual-outline"),
    "rle as JSON text": (outline(json.dumps({"size": [16, 20], "counts": STRING})), "unusual-rle"),
    "a box of numerals": (every("annotations", bbox=["2", "3.0", "10", "8"]), "unusual-number"),
    "an area as text": (every("annotations", area="80.0"), "unusual-number"),
    "iscrowd as text": (every("annotations", iscrowd="0"), "unusual-number"),
}


@pytest.mark.parametrize("crowd", ["1", "1.0", 1.0, True])
def test_crowd_regions_are_marked_in_any_spelling(crowd, tmp_path):
    def mark(coco):
        coco["annotations"][0]["iscrowd"] = crowd

    splits = load_coco(dataset(tmp_path / "set", mark), cache_dir=tmp_path / "cache")
    assert sum(one["iscrowd"] for split in splits.values() for row in split for one in row["objects"]) == 1


def test_a_class_may_be_named_by_a_number(tmp_path):
    root = dataset(tmp_path / "set", every("categories", name=5))
    assert [one.name for one in categories_of(load_coco(root, cache_dir=tmp_path / "cache")["train"])] == ["5"]
    examination = examine(root, SETTINGS)
    assert [one.kind for one in examination.findings if one.severity != "warning"] == ["number-as-name"]
    repair(examination, tmp_path / "copy")
    assert objects(tmp_path / "copy", tmp_path / "cache") == objects(root, tmp_path / "cache")


@pytest.mark.parametrize("change", [every("annotations", iscrowd=None), every("annotations", bbox=[], area=None)])
def test_null_and_empty_lists_count_as_absent(change, tmp_path):
    expected = objects(dataset(tmp_path / "base"), tmp_path / "cache")
    root = dataset(tmp_path / "set", change)
    assert objects(root, tmp_path / "cache") == expected
    assert {one.kind for one in examine(root, SETTINGS).findings} == {"held-out"}


@pytest.mark.parametrize("case", HONEST)
def test_certain_values_are_used_as_they_are_and_counted(case, tmp_path):
    change, kind = HONEST[case]
    expected = objects(dataset(tmp_path / "base"), tmp_path / "cache")
    root = dataset(tmp_path / "set", change)
    assert objects(root, tmp_path / "cache") == expected
    examination = examine(root, SETTINGS)
    assert examination.status == 0
    assert {one.kind for one in examination.findings if one.severity != "warning"} == {kind}
    assert sum(one.count for one in examination.findings if one.kind == kind) >= 6 or kind == "unusual-id"
    repair(examination, tmp_path / "copy")
    assert objects(tmp_path / "copy", tmp_path / "cache") == expected
    assert [one for one in examine(tmp_path / "copy", SETTINGS).findings if one.severity != "warning"] == []


GUESSES = {
    "a fraction as id": (all_ids(lambda k: k + 0.5), "got 1.5"),
    "true as id": (every("images", id=True), "got True"),
    "a list as id": (all_ids(lambda k: [k]), r"got \[1\]"),
    "1 and 01 as ids": (
        lambda coco: (coco["images"][0].update(id="1"), coco["images"][1].update(id="01")),
        "refer to an image that isn't in `images`: ids 1, 2",
    ),
    "an odd part beside a good one": (outline([SQUARE, [1, 2, 3, 4, 5, 6, 7]]), "polygon 1: expected at least three"),
    "a part with NaN beside a good one": (outline([SQUARE, [1, 2, float("nan"), 4, 5, 6]]), "finite coordinates"),
    "points of three numbers": (outline([[x, y, 1] for x, y in POINTS]), "expected at least three points"),
    "swapped size without a box": (
        in_turn(outline({"size": [20, 16], "counts": COUNTS}), every("annotations", bbox=None)),
        "expected an RLE of size",
    ),
    "swapped size with another box": (
        in_turn(outline({"size": [20, 16], "counts": COUNTS}), every("annotations", bbox=[5, 5, 3, 3])),
        "expected an RLE of size",
    ),
    "rle without a size or a box": (
        in_turn(outline({"counts": COUNTS}), every("annotations", bbox=None)),
        "expected an RLE of size",
    ),
    "a box with a word": (every("annotations", bbox=[2, 3, "ten", 8]), r"got \[2, 3, 'ten', 8\]"),
    "only a point": (outline([[10, 8]]), "expected at least three points"),
}


@pytest.mark.parametrize("case", GUESSES)
def test_guesses_are_refused(case, tmp_path):
    change, message = GUESSES[case]
    with pytest.raises(DataError, match=message):
        objects(dataset(tmp_path / "set", change), tmp_path / "cache")


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_size_is_not_guessed_for_a_photo_with_an_exif_rotation(orientation, tmp_path):
    root = dataset(tmp_path / "set", without("images", "height", "width"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 16)).save(root / "images/img_0.png", exif=exif)
    with pytest.raises(DataError, match=r"turn this photo by its EXIF orientation, .* Give --exif_frame displayed"):
        objects(root, tmp_path / "cache")


def test_an_image_listed_twice_is_one_image_with_all_its_objects(tmp_path):
    def listed_twice(coco):
        coco["images"] += [{**image, "id": image["id"] + 10} for image in coco["images"]]
        moved = [[value + 6 if k % 2 == 0 else value for k, value in enumerate(SQUARE)]]
        more = [{**one, "id": one["id"] + 10, "image_id": one["image_id"] + 10} for one in coco["annotations"]]
        coco["annotations"] += [{**one, "segmentation": moved, "bbox": [8, 3, 10, 8]} for one in more]

    root = dataset(tmp_path / "set", listed_twice)
    found = objects(root, tmp_path / "cache")
    assert len(found) == len({(file, str(mask)) for file, _, mask in found}) == 12
    examination = examine(root, SETTINGS)
    notes = {one.kind: one.ids for one in examination.findings if one.severity == "note"}
    assert notes == {"merged-entries": list(range(11, 17))}
    repair(examination, tmp_path / "copy")
    assert objects(tmp_path / "copy", tmp_path / "cache") == found


def test_an_image_listed_twice_with_two_sizes_is_refused(tmp_path):
    def listed_twice(coco):
        coco["images"].append({**coco["images"][0], "id": 10, "height": 17})

    with pytest.raises(DataError, match="image 10 is the same file as image 1 but has another size"):
        objects(dataset(tmp_path / "set", listed_twice), tmp_path / "cache")


def test_ids_keep_their_values_where_they_can():
    ids = Ids([5, "7", "x", 2**70, "5", None, True])
    assert [ids.number_of(value) for value in (5, "7", 7, "x", " x", 2**70)] == [5, 7, 7, 6, 6, 8]
    assert ids.number_of("5") == 9, "5 is another entry's"
    assert [ids.number_of(value) for value in (True, None, 1.5, float("nan"), [5], "y", 6)] == [None] * 7
    assert Ids([1, 2]).is_plain
    assert not ids.is_plain


@pytest.mark.parametrize(
    ("value", "number"),
    [(20, 20), (20.0, 20), ("20", 20), (" 20.0 ", 20), (20.5, None), ("-1", None), ("1e3", None), (True, None)],
)
def test_whole_numbers_in_any_spelling(value, number):
    assert whole_number(value) == number


def test_numbers_and_boxes_as_text():
    found = [number(value) for value in (2, 2.5, "2", " -2.5e1 ", ".5", "1e999", "2,5", "", True, None, float("nan"))]
    assert found == [2, 2.5, 2, -25, 0.5, None, None, None, None, None, None]
    assert usual_box(["1", 2, 3.5, "4"]) == [1, 2, 3.5, 4]
    assert [usual_box(value) for value in ([1, 2, 3], [1, 2, -3, 4], "1 2 3 4", None)] == [None] * 4


@pytest.mark.parametrize(
    "value",
    [None, 3, "text", "[" * 100000, [], {}, [[]], [[1, 2]], [[[[1]]]], [[[[[SQUARE]]]]], {"size": 3, "counts": "b'\\"}],
)
def test_what_is_no_segmentation_has_no_usual_form(value):
    assert usual_segmentation(value, 16, 20, None) is None


def test_the_field_cases_start_from_a_sound_dataset(tmp_path):
    assert len(objects(dataset(tmp_path / "set"), tmp_path / "cache")) == len(base()["annotations"])
    assert {one.kind for one in examine(tmp_path / "set", SETTINGS).findings} == {"held-out"}
    square = np.zeros((16, 20), dtype=np.uint8)
    square[3:11, 2:12] = 1
    assert objects(tmp_path / "set", tmp_path / "cache")[0] == ("img_0.png", "cell", square.tolist())
    assert json.loads((tmp_path / "set/annotations.json").read_text()) == base()
