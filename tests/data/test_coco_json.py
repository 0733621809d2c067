"""Annotation files with any error are rejected with file, id and remedy, and no image outside the folder is read."""

import json

import pytest

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import can_be_corrected, repair
from m2f_trainer.errors import DataError
from tests.data.folders import annotation, content, write
from tests.data.honest import picture

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
    "image without id": (content(images=[{"file_name": "a.png"}]), "whole number or text as `id`, found none"),
    "fraction id": (content(annotation(1.5)), "got 1.5"),
    "boolean id": (content(annotation(True)), "got True"),
    "no category_id": (
        content(annotation(7, category_id=None)),
        "annotation 7: expected a whole number or text as `category_id`",
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
    "crowd in words": (content(annotation(8, iscrowd="yes")), "`iscrowd` that isn't 0 or 1: ids 8"),
    "no file name": (content(images=[{**IMAGE, "file_name": None}]), "image 1: expected a `file_name`, got None"),
    "bomb": (
        content(images=[{**IMAGE, "width": 2**31, "height": 2**31}]),
        "more than the limit of 89,478,485.* --max_pixels",
    ),
    "bad polygon": (content(annotation(6, segmentation=[[1, 2, 3]])), "annotation 6 of image 1 .a.png., polygon 0"),
    "box only": (content(annotation(6, segmentation=[])), "annotation 6 .*segmentation is empty"),
    "box only, with an empty part": (
        content(annotation(6, segmentation=[[]])),
        "annotation 6 .*boxes only. Add outlines",
    ),
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


@pytest.mark.parametrize("change", [{"file_name": "b.png"}, {"height": 12}])
def test_one_id_for_two_images_is_refused_by_training_and_by_the_repair(change, tmp_path):
    """As where two exports that both count from 1 are joined: nobody knows which image an annotation belongs to."""
    images = [{**IMAGE, "id": k, "file_name": f"{k}.png"} for k in range(1, 9)]
    objects = [annotation(k, image_id=k) for k in range(1, 9)]
    root = write(tmp_path / "set", content(*objects, images=[*images, images[0], {**images[1], **change}]))
    for name in ("b.png", *(image["file_name"] for image in images)):
        picture(root / "train" / name)
    with pytest.raises(
        DataError, match=r"found more than once: 2\. Image 2 is '2.png' of 20x16 pixels and '.*Give each"
    ):
        load_coco(root, cache_dir=tmp_path / "cache")
    examination = examine(root)
    errors = {one.kind: one.ids for one in examination.findings if one.severity == "error"}
    assert errors == {"duplicate-image-id": [2], "repeated-image-entry": [1]}
    assert not can_be_corrected(examination)
    with pytest.raises(
        DataError, match=r"(?s)nothing is written: .* image ids must be unique, found more than once: 2\."
    ):
        repair(examination, tmp_path / "copy")


@pytest.mark.parametrize(
    "change",
    [{"width": "20"}, {"width": 20.0}, {"file_name": "./2.png"}, {"file_name": ".\\2.png"}, {"width": None}, None],
)
def test_an_image_listed_twice_in_two_spellings_is_listed_once_in_the_copy(change, tmp_path):
    images = [{**IMAGE, "id": k, "file_name": f"{k}.png"} for k in range(1, 9)]
    again = {**images[1], **change} if change else {"id": 2, "file_name": "2.png"}
    root = write(tmp_path / "set", content(*(annotation(k, image_id=k) for k in range(1, 9)), images=[*images, again]))
    for image in images:
        picture(root / "train" / image["file_name"])
    with pytest.raises(DataError, match=r"found more than once: 2\. List each image once"):
        load_coco(root, cache_dir=tmp_path / "cache")
    repair(examine(root), tmp_path / "copy")
    rows = load_coco(tmp_path / "copy", cache_dir=tmp_path / "cache")
    assert sorted(row["image_id"] for split in rows.values() for row in split) == list(range(1, 9))


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


def test_a_test_split_without_annotations_stops_nothing(tmp_path):
    for split in ("train", "valid"):
        write(tmp_path / "set", content(), split=split)
    write(tmp_path / "set", {key: value for key, value in content().items() if key != "annotations"}, split="test")
    splits = load_coco(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert {split: len(rows[0]["objects"]) for split, rows in splits.items()} == {"train": 1, "valid": 1, "test": 0}
    examination = examine(tmp_path / "set")
    assert examination.status == 0
    assert "test-without-annotations" in {one.kind for one in examination.findings}
    done = repair(examination, tmp_path / "copy")
    assert done.counts["test"]["images"] == (1, 1)
