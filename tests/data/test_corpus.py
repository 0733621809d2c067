"""Two hundred malformed datasets, images and recipes: none crashes, hangs or passes, each is reported with a remedy."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import (
    IMAGES,
    NAMES,
    PLACES,
    SEGMENTATIONS,
    run,
    set_with,
    with_image,
    with_name,
    with_place,
    with_segmentation,
)
from tests.data.folders import annotation, content, write
from tests.data.test_coco_json import BAD_FILES

REMEDY = re.compile(
    r"\b(Add|Annotate|Build|Check|Copy|Correct|Cut|Convert|Export|Give|Keep|Leave|Multiply|Name|Put|Remove|Renumber|"
    r"Replace|Save|Scale|Set|The nearest|the nearest|Unknown|[Ee]xpected|git lfs pull|"
    r"never code|Broken JSON|must stay|use|give)\b"
)

RECIPES: dict[str, Any] = {
    "broken": "{",
    "empty file": "",
    "a list": "[]",
    "text": '"a"',
    "null": "null",
    "twice the same key": '{"num_queries": 3, "num_queries": 4}',
    "NaN": '{"learning_rate": NaN}',
    "infinity": '{"learning_rate": Infinity}',
    "deep": "[" * 100_000,
    "unknown key": {"num_querys": 3},
    "another tool's key": {"model_name_or_path": "a"},
    "text for a number": {"num_queries": "3"},
    "a number for text": {"backbone": 3},
    "true for a number": {"num_queries": True},
    "a fraction for a count": {"num_queries": 3.5},
    "no queries": {"num_queries": 0},
    "negative queries": {"num_queries": -1},
    "height 0": {"image_height": 0},
    "no multiple": {"image_height": 1000},
    "unknown augmentation": {"augmentation": "wild"},
    "scales the wrong way": {"lsj_min_scale": 2, "lsj_max_scale": 1},
    "jitter beyond 1": {"color_jitter": 2},
    "copy-paste beyond 1": {"copy_paste": 1.5},
    "area 0": {"min_instance_area": 0},
    "a Python file": {"backbone": "evil.py"},
    "a token": {"hub_token": "hf_x"},
    "unused columns": {"remove_unused_columns": True},
    "two strategies": {"save_strategy": "steps", "checkpointing_steps": "epoch"},
    "checkpoints never": {"checkpointing_steps": 0},
    "two heads": {"head_checkpoint": "a", "init_from": "b"},
    "unknown neck": {"neck": "long"},
    "no dataset": {"dataset_name": None},
}


def outcomes(folder: Path, makers: dict[str, Any], kind: str = "dataset") -> dict[str, tuple[str, str]]:
    roots = {name: make(folder / str(number) / "set") for number, (name, make) in enumerate(makers.items())}
    results = run([(kind, str(root)) for root in roots.values()])
    return dict(zip(roots, results, strict=True))


def makers() -> dict[str, Any]:
    """Every malformed dataset by name; a maker writes it and returns its root."""
    found: dict[str, Any] = {}
    for name, value in SEGMENTATIONS.items():
        found[f"segmentation {name}"] = lambda folder, value=value: with_segmentation(folder, value)
    for name, data in IMAGES.items():
        found[f"image {name}"] = lambda folder, data=data: with_image(folder, data())
    for name, make in PLACES.items():
        found[f"place {name}"] = lambda folder, make=make: with_place(folder, make)
    for name, text in NAMES.items():
        found[f"path {name}"] = lambda folder, text=text: with_name(folder, text)
    for name, (coco, _) in BAD_FILES.items():
        found[f"file {name}"] = lambda folder, coco=coco: set_with(folder, coco)
    crowd = annotation(segmentation={"size": [16, 20], "counts": [300, 20]}, iscrowd=1)
    found["set of crowds"] = lambda folder: set_with(folder, content(crowd))
    found["set without valid"] = lambda folder: write(folder, content())
    found["set without train"] = lambda folder: write(folder, content(), split="valid")
    found["set of one name twice"] = lambda folder: set_with(folder, content(categories=[{"id": 5, "name": "x"}]))
    return found


ALL = makers()
SOME = list(ALL)[::7]


def check_reported(name: str, outcome: str, message: str) -> None:
    assert outcome == "refused", (name, outcome, message)
    assert REMEDY.search(message), (name, message)
    if not name.startswith("set"):
        assert re.search(r"_annotations\.coco\.json|image 1 |split 'train'", message), (name, message)
    if name.startswith("segmentation"):
        assert "annotation 4711" in message, message


@pytest.mark.parametrize("kind", ["dataset", "check"])
def test_malformed_datasets_are_refused_without_crash_or_hang(kind, tmp_path):
    for name, (outcome, message) in outcomes(tmp_path, {name: ALL[name] for name in SOME}, kind).items():
        check_reported(name, outcome, message)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dataset", "check"])
def test_every_malformed_dataset_is_refused_without_crash_or_hang(kind, tmp_path):
    assert len(ALL) + len(RECIPES) >= 120
    for name, (outcome, message) in outcomes(tmp_path, ALL, kind).items():
        check_reported(name, outcome, message)


def test_thirty_ways_out_of_the_folder_are_refused(tmp_path):
    assert len(NAMES) >= 30
    attacks = {name: make for name, make in ALL.items() if name.startswith("path ")}
    for name, (outcome, message) in outcomes(tmp_path, attacks).items():
        check_reported(name, outcome, message)
        assert "file_name" in message, (name, message)


def test_malformed_recipes_are_refused_with_their_key(tmp_path):
    cases = []
    for number, recipe in enumerate(RECIPES.values()):
        path = tmp_path / f"{number}.json"
        text = recipe if isinstance(recipe, str) else json.dumps({"dataset_name": "a", **recipe})
        path.write_text(text)
        cases.append(("recipe", [str(path)]))
    for (name, recipe), (outcome, message) in zip(RECIPES.items(), run(cases), strict=True):
        assert outcome == "refused", (name, outcome, message)
        assert REMEDY.search(message), (name, message)
        if isinstance(recipe, dict):
            assert any(key in message for key in recipe), (name, message)
