"""The dataset doctor finds every planted fault, reports nothing else, and goes on after each."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.problems import KINDS
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.doctor.examine import Examination, examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.doctor.summary import summary_text
from m2f_trainer.errors import DataError
from tests.data.folders import REAL, content, needs_real_data, write
from tests.data.honest import dataset

Coco = dict[str, Any]
PLANTS: dict[str, Callable[[Coco, Path], Any]] = {}
"""Kind of finding -> what plants it in the training split: a change of its annotations or of its image files."""


def plant(function: Callable[[Coco, Path], Any]) -> Callable[[Coco, Path], Any]:
    PLANTS[function.__name__.replace("_", "-")] = function
    return function


def common(coco: Coco) -> list[dict[str, Any]]:
    """Objects of the class with the most of them, so that no class dies with one; on different images, large first."""
    objects = [one for one in coco["annotations"] if not one["iscrowd"]]
    classes = [one["category_id"] for one in objects]
    best = max(set(classes), key=classes.count)
    found = sorted((one for one in objects if one["category_id"] == best), key=lambda one: -one["area"])
    return list({one["image_id"]: one for one in reversed(found)}.values())[::-1]


def spare(coco: Coco, folder: Path) -> dict[str, Any]:
    """A new image unlike the others, without objects."""
    number = max(image["id"] for image in coco["images"]) + 1
    noise = np.random.default_rng(number).integers(0, 255, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((160, 120), Image.Resampling.NEAREST).save(folder / f"spare{number}.png")
    coco["images"].append({"id": number, "file_name": f"spare{number}.png", "height": 120, "width": 160})
    return coco["images"][-1]


@plant
def bad_image_entry(coco, folder):
    coco["images"].append({"id": 10**6, "height": 5, "width": 5})


@plant
def bad_annotation_entry(coco, folder):
    common(coco)[0]["id"] = 7.5


@plant
def bad_category_entry(coco, folder):
    coco["categories"].append({"id": 10**6})


@plant
def repeated_image_entry(coco, folder):
    coco["images"].append(dict(coco["images"][0]))


@plant
def duplicate_annotation_id(coco, folder):
    common(coco)[1]["id"] = common(coco)[0]["id"]


@plant
def duplicate_category_id(coco, folder):
    coco["categories"].append(next(one for one in coco["categories"] if one["id"] == common(coco)[0]["category_id"]))


@plant
def orphan_annotation(coco, folder):
    common(coco)[0]["image_id"] = 10**6


@plant
def unknown_category(coco, folder):
    common(coco)[0]["category_id"] = 10**6


@plant
def bad_crowd(coco, folder):
    common(coco)[0]["iscrowd"] = "yes"


@plant
def bad_mask(coco, folder):
    common(coco)[0]["segmentation"] = [[1, 2, 3, float("nan"), 5, 6]]


@plant
def no_mask(coco, folder):
    common(coco)[0]["segmentation"] = []


@plant
def bad_box(coco, folder):
    common(coco)[0]["bbox"] = [1, 2, 3]


@plant
def bad_area(coco, folder):
    common(coco)[0]["area"] = -5


@plant
def unsafe_path(coco, folder):
    spare(coco, folder)["file_name"] = "../secret.png"


@plant
def missing_image(coco, folder):
    (folder / spare(coco, folder)["file_name"]).unlink()


@plant
def bad_image(coco, folder):
    (folder / spare(coco, folder)["file_name"]).write_bytes(b"<html>")


@plant
def wrong_image_size(coco, folder):
    Image.new("RGB", (33, 44)).save(folder / spare(coco, folder)["file_name"])


@plant
def duplicate_image(coco, folder):
    image = coco["images"][0]
    shutil.copy(folder / image["file_name"], folder / "copy.png")
    coco["images"].append({**image, "id": 10**6, "file_name": "copy.png"})


@plant
def leakage(coco, folder):
    other = json.loads((folder.parent / "valid/_annotations.coco.json").read_text())["images"][0]
    with Image.open(folder.parent / "valid" / other["file_name"]) as image:
        half = image.convert("RGB").resize((image.width // 2, image.height // 2))
    half.save(folder / "leak.jpg", quality=80)
    coco["images"].append({"id": 10**6, "file_name": "leak.jpg", "height": half.height, "width": half.width})


@plant
def box_mismatch(coco, folder):
    common(coco)[0]["bbox"][2] *= 3


@plant
def area_mismatch(coco, folder):
    common(coco)[0]["area"] *= 3


@plant
def empty_mask(coco, folder):
    image = spare(coco, folder)
    one = {"image_id": image["id"], "category_id": common(coco)[0]["category_id"], "bbox": [0, 0, 0, 0]}
    outline = [[9.1, 9.1, 9.2, 9.1, 9.2, 9.2]]
    coco["annotations"].append({**one, "id": 10**6, "iscrowd": 0, "segmentation": outline})


@plant
def outside_image(coco, folder):
    image = spare(coco, folder)
    one = {"image_id": image["id"], "category_id": common(coco)[0]["category_id"], "bbox": [0, 0, 0, 0]}
    outline = [[-9, -9, -5, -9, -5, -5]]
    coco["annotations"].append({**one, "id": 10**6, "iscrowd": 0, "segmentation": outline})


@plant
def duplicate_object(coco, folder):
    coco["annotations"].append({**common(coco)[0], "id": 10**6})


@plant
def object_of_two_classes(coco, folder):
    """The class is added to every split, so that it is missing from none."""
    paths = [path for path in folder.parent.glob("*/_annotations.coco.json") if path.parent != folder]
    read = {path: json.loads(path.read_text()) for path in paths}
    one = common(coco)[0]
    for other in (coco, *read.values()):
        other["categories"].append({"id": 10**6, "name": "unicorn"})
        added = one if other is coco else {**common(other)[0], "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]]}
        size = {} if other is coco else {"bbox": [5, 5, 20, 20], "area": 400}
        other["annotations"].append({**added, **size, "id": 10**6, "category_id": 10**6})
    for path, other in read.items():
        path.write_text(json.dumps(other))


@plant
def tiny_object(coco, folder):
    one = {"image_id": spare(coco, folder)["id"], "category_id": common(coco)[0]["category_id"], "iscrowd": 0}
    coco["annotations"].append({**one, "id": 10**6, "segmentation": [[9, 9, 9.8, 9, 9.8, 19, 9, 19]]})


@plant
def self_intersection(coco, folder):
    image = spare(coco, folder)
    one = {"image_id": image["id"], "category_id": common(coco)[0]["category_id"], "iscrowd": 0}
    coco["annotations"].append({**one, "id": 10**6, "segmentation": [[5, 5, 45, 45, 45, 5, 5, 45]]})


@plant
def exif_rotation(coco, folder):
    path = folder / spare(coco, folder)["file_name"]
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.convert("RGB").save(path, exif=exif)


@plant
def converted_image(coco, folder):
    path = folder / spare(coco, folder)["file_name"]
    with Image.open(path) as image:
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(path)


@plant
def unused_category(coco, folder):
    coco["categories"].append({"id": 10**6, "name": "unicorn"})


@plant
def renamed_category(coco, folder):
    next(one for one in coco["categories"] if one["id"] == common(coco)[0]["category_id"])["name"] = "other"


@plant
def missing_class(coco, folder):
    coco["categories"].append({"id": 10**6, "name": "unicorn"})
    common(coco)[0]["category_id"] = 10**6


@plant
def duplicate_category_name(coco, folder):
    """In every split, so that the class is missing from none."""
    name = next(one["name"] for one in coco["categories"] if one["id"] == common(coco)[0]["category_id"])
    others = [path for path in folder.parent.glob("*/_annotations.coco.json") if path.parent != folder]
    read = {path: json.loads(path.read_text()) for path in others}
    for one in (coco, *read.values()):
        one["categories"].append({"id": 10**6, "name": f" {name.upper()}"})
        common(one)[0]["category_id"] = 10**6
    for path, other in read.items():
        path.write_text(json.dumps(other))


@plant
def many_instances(coco, folder):
    one = {"image_id": spare(coco, folder)["id"], "category_id": common(coco)[0]["category_id"], "iscrowd": 0}
    places = ((2 * (k % 60), 4 * (k // 60)) for k in range(1001))
    outlines = ([[x, y, x + 20, y, x + 20, y + 20, x, y + 20]] for x, y in places)
    coco["annotations"] += [{**one, "id": 10**6 + k, "segmentation": outline} for k, outline in enumerate(outlines)]


def copied(name: str, target: Path) -> Path:
    return Path(shutil.copytree(REAL / name, target / name))


def change(root: Path, kind: str) -> None:
    file = root / "train/_annotations.coco.json"
    coco = json.loads(file.read_text())
    PLANTS[kind](coco, root / "train")
    file.write_text(json.dumps(coco))


def finding_ids(examination: Examination) -> dict[tuple[str, str], list[Any]]:
    return {(one.kind, one.file.split("/")[-2]): list(one.ids) for one in examination.findings}


def lenient() -> Settings:
    """With enough queries that the planted instance does not exceed them."""
    return Settings(320, 320, num_queries=1000)


@pytest.fixture(scope="module")
def sound():
    return {name: finding_ids(examine(REAL / name, lenient())) for name in ("coco_tiny", "nuclei_tiny")}


@needs_real_data
@pytest.mark.parametrize("name", ["coco_tiny", "nuclei_tiny"])
@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_fault_is_found_and_nothing_else_is_reported(kind, name, sound, tmp_path):
    root = copied(name, tmp_path)
    change(root, kind)
    examination = examine(root, lenient())
    found = finding_ids(examination)
    new = {key: ids for key, ids in found.items() if sound[name].get(key) != ids}
    assert {key[0] for key in new} == {kind}
    assert not set(sound[name]) - set(found)
    assert examination.status == (KINDS[kind].severity == "error")
    assert all(str(root) in one.file for one in examination.findings)


@needs_real_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco_permissive", "dsb2018_nuclei"])
@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_fault_is_found_in_large_sets_too(kind, name, tmp_path):
    before = finding_ids(examine(REAL / name, lenient()))
    root = copied(name, tmp_path)
    change(root, kind)
    found = finding_ids(examine(root, lenient()))
    assert {key[0] for key, ids in found.items() if before.get(key) != ids} == {kind}


def test_all_errors_are_collected_not_only_the_first(tmp_path):
    root = write_sample(tmp_path / "set", images=(24, 6, 0))
    kinds = ["bad-mask", "bad-image-entry", "bad-category-entry", "missing-image", "unsafe-path", "bad-image"]
    for kind in kinds:
        change(root, kind)
    found = {one.kind for one in examine(root).findings if one.severity == "error"}
    assert found == set(kinds)
    repair(examine(root), tmp_path / "fixed")
    assert examine(tmp_path / "fixed").status == 0


def test_missing_or_duplicate_classes_and_too_many_instances_are_reported(tmp_path):
    names = [{"id": 5, "name": "cell"}, {"id": 6, "name": " Cell"}]
    first = content(categories=names)
    second = json.loads(json.dumps(first))
    second["annotations"][0]["category_id"] = 6
    write(tmp_path, first)
    write(tmp_path, second, split="valid")
    Image.fromarray(np.arange(320, dtype=np.uint8).reshape(16, 20)).save(tmp_path / "valid/a.png")
    examination = examine(tmp_path, Settings(64, 64, num_queries=0))
    assert {one.kind for one in examination.findings} == {"missing-class", "duplicate-category-name", "many-instances"}
    repair(examination, tmp_path.with_name("merged"))
    after = examine(tmp_path.with_name("merged"), Settings(64, 64))
    assert [(one.id, one.name) for one in after.categories] == [(5, "cell")]
    assert after.findings == ()


def test_no_usable_image_differs_from_errors(tmp_path):
    assert examine(tmp_path / "nowhere").status == 2
    write(tmp_path, "{")
    assert examine(tmp_path).status == 2
    write(tmp_path, content(), split="valid")
    examination = examine(tmp_path)
    assert examination.status == 1
    assert [one.kind for one in examination.findings] == ["unusable", "missing-split"]


def test_a_split_without_objects_is_an_error(tmp_path):
    write(tmp_path, content())
    write(tmp_path, {**content(), "annotations": []}, split="valid")
    Image.fromarray(np.arange(320, dtype=np.uint8).reshape(16, 20)).save(tmp_path / "valid/a.png")
    assert [one.kind for one in examine(tmp_path).findings] == ["no-objects"]


def test_a_test_split_without_objects_is_reported_and_used_as_training_uses_it(tmp_path):
    for shade, (split, coco) in enumerate(
        {"train": content(), "valid": content(), "test": {**content(), "annotations": []}}.items()
    ):
        write(tmp_path, coco, split=split)
        Image.fromarray(np.roll(np.arange(320, dtype=np.uint8), 50 * shade).reshape(16, 20)).save(
            tmp_path / split / "a.png"
        )
    examination = examine(tmp_path)
    assert [(one.kind, one.file) for one in examination.findings] == [
        ("missing-class", str(tmp_path / "test/_annotations.coco.json"))
    ]
    assert examination.status == 0


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"images": [{"id": 1, "file_name": "x/a\ud83d.png", "height": 16, "width": 20}]}, "bad-image-entry"),
        ({"categories": [{"id": 5, "name": "cell \ud83d"}]}, "unnamed-category"),
    ],
)
def test_a_name_cut_in_the_middle_of_a_character_is_an_error(changes, kind, tmp_path):
    write(tmp_path, content(**changes))
    findings = examine(tmp_path).findings
    assert kind in {one.kind for one in findings}
    assert r"\ud83d" in next(one.message for one in findings if one.kind == kind)
    with pytest.raises(DataError, match=r"\\ud83d"):
        load_coco(tmp_path, cache_dir=tmp_path / "cache")


def test_a_terminal_shows_the_progress_and_a_file_does_not(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    root = write_sample(tmp_path / "set", images=(5, 2, 0))
    for stream, progress, shown in ((Terminal(), True, True), (io.StringIO(), True, False), (Terminal(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        examine(root, progress=progress)
        assert ("0/7" in stream.getvalue()) is shown


@pytest.mark.parametrize("chosen", [(1,), (6,), (2, 5)])
def test_the_held_out_fifth_has_objects_wherever_there_are_any_to_share(chosen, tmp_path):
    """Of six images only these have an object; one object can't be in both splits."""

    def drop(coco):
        coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] in chosen]

    examination = examine(dataset(tmp_path / "set", drop))
    objects = {split: sum(len(scan.targets) for scan in scans) for split, scans in examination.scans.items()}
    kinds = {one.kind for one in examination.findings if one.severity == "error"}
    if len(chosen) == 1:
        assert kinds == {"no-objects"}
    else:
        assert (objects, kinds) == ({"train": 1, "valid": 1}, set())


def test_the_cause_is_reported_before_its_consequence(tmp_path):
    root = write_sample(tmp_path / "set", images=(5, 2, 0))
    path = root / "train/_annotations.coco.json"
    path.write_text(path.read_text()[:-40])
    examination = examine(root)
    assert [one.kind for one in examination.findings if one.severity == "error"] == ["unusable", "missing-split"]
    text = summary_text(examination)
    assert text.index("not valid JSON") < text.index("expected a split 'train' with usable images")
