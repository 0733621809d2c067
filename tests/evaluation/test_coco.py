"""The COCO metrics equal those of pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m2f_trainer.data.dataset import Category, load_coco
from m2f_trainer.errors import DataError
from m2f_trainer.evaluation.coco import CocoMap, Engine, metrics_table
from m2f_trainer.inference.instances import Instances
from tests.evaluation.truth import (
    REAL_DATA,
    categories_in,
    instances_from,
    perfect,
    real_annotations,
    rows_of,
    synthetic,
)

ENGINES: tuple[Engine, ...] = ("hotcoco", "pycocotools")
KEYS = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
KEYS += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]


def use(engine: Engine) -> Engine:
    if engine == "hotcoco":
        pytest.importorskip("hotcoco")
    return engine


def official(coco: dict[str, Any], predictions: list[Instances], kind: str) -> COCOeval:
    """The result of pycocotools on the unchanged annotation dictionary."""
    truth = COCO()
    truth.dataset = copy.deepcopy(coco)
    entries = [entry for item in predictions for entry in item.to_coco()]
    if kind == "bbox":
        boxes = [box for item in predictions for box in item.boxes.tolist()]
        entries = [
            {key: value for key, value in entry.items() if key != "segmentation"} | {"bbox": box}
            for entry, box in zip(entries, boxes, strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(entries), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def from_one(coco: dict[str, Any]) -> dict[str, Any]:
    """The same annotations numbered from 1: pycocotools counts a match with annotation id 0 as a miss."""
    annotations = [item | {"id": number} for number, item in enumerate(coco["annotations"], 1)]
    return coco | {"annotations": annotations}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_figure_equals_pycocotools(engine: Engine) -> None:
    coco, predictions = synthetic(30, seed=1)
    metrics = CocoMap(rows_of(coco), categories_in(coco), engine=use(engine))(predictions)
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
        stats = official(from_one(coco), predictions, kind).stats
        assert [metrics[prefix + key] for key in KEYS] == pytest.approx(list(stats), abs=1e-12)
    assert 0.05 < metrics["map"] < 0.95


@pytest.mark.parametrize("engine", ENGINES)
def test_categories_may_have_negative_ids(engine: Engine) -> None:
    coco, predictions = synthetic(6, seed=4)
    expected = CocoMap(rows_of(coco), categories_in(coco), engine=use(engine))(predictions)
    for item in coco["annotations"]:
        item["category_id"] -= 100
    moved = [Category(one.id - 100, one.name) for one in categories_in(coco)]
    found = [replace(one, category_ids=one.category_ids - 100) for one in predictions]
    assert CocoMap(rows_of(coco), moved, engine=use(engine))(found) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_class_figures_equal_pycocotools_and_absent_classes_are_minus_one(engine: Engine) -> None:
    coco, predictions = synthetic(12, seed=2)
    metrics = CocoMap(rows_of(coco), categories_in(coco), engine=use(engine))(predictions)
    precision = official(from_one(coco), predictions, "segm").eval["precision"]
    for index, category in enumerate(sorted(coco["categories"], key=lambda item: item["id"])):
        values = precision[:, :, index, 0, -1]
        expected = values[values > -1].mean() if (values > -1).any() else -1
        assert metrics[f"map_class/{category['name']}"] == pytest.approx(expected, abs=1e-12)
    assert metrics["map_class/thing 999"] == -1


@pytest.mark.parametrize("name", ["nuclei_tiny", "coco_tiny", "coco_permissive"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_perfect_predictions_of_real_annotations_score_as_in_pycocotools(name: str, split: str, tmp_path: Path) -> None:
    coco = real_annotations(name, split)
    rows = load_coco(REAL_DATA / name, cache_dir=tmp_path)[split]
    predictions = perfect(rows)
    for engine in ENGINES:
        metrics = CocoMap(rows, engine=use(engine))(predictions)
        for kind, prefix in (("segm", ""), ("bbox", "box_")):
            stats = official(coco, predictions, kind).stats
            assert [metrics[prefix + key] for key in KEYS] == pytest.approx(list(stats), abs=1e-12)
        assert metrics["map"] > 0.9


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_predicted_twice_counts_once(engine: Engine) -> None:
    coco, predictions = synthetic(8, seed=3)
    scorer = CocoMap(rows_of(coco), categories_in(coco), engine=use(engine))
    assert scorer(predictions + predictions[:3]) == scorer(predictions)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_order_of_the_images_does_not_matter(engine: Engine) -> None:
    coco, predictions = synthetic(8, seed=4)
    scorer = CocoMap(rows_of(coco), categories_in(coco), engine=use(engine))
    assert scorer(predictions[::-1]) == scorer(predictions)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_predictions_score_zero(engine: Engine) -> None:
    coco, predictions = synthetic(6, seed=5)
    scorer = CocoMap(rows_of(coco), categories_in(coco), engine=use(engine))
    none = [instances_from(item.image_id, item.size, []) for item in predictions]
    for given in ([], none):
        metrics = scorer(given)
        assert metrics["map"] == 0
        assert metrics["box_mar_100"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_split_without_objects_scores_minus_one(engine: Engine) -> None:
    coco, predictions = synthetic(4, seed=6)
    scorer = CocoMap(rows_of(coco | {"annotations": []}), categories_in(coco), engine=use(engine))
    assert scorer(predictions)["map"] == -1
    assert scorer([])["map"] == -1


@pytest.mark.parametrize("engine", ENGINES)
def test_scoring_leaves_the_predictions_as_they_were_and_prints_nothing(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    coco, predictions = synthetic(5, seed=7)
    before = [item.to_coco() for item in predictions]
    scorer = CocoMap(rows_of(coco), categories_in(coco), engine=use(engine))
    assert scorer(predictions) == scorer(predictions)
    assert [item.to_coco() for item in predictions] == before
    assert capsys.readouterr() == ("", "")


def test_both_engines_give_the_same_numbers_to_the_last_bit() -> None:
    pytest.importorskip("hotcoco")
    coco, predictions = synthetic(300, seed=8)
    rows, categories = rows_of(coco), categories_in(coco)
    first = CocoMap(rows, categories, engine="hotcoco")(predictions)
    assert first == CocoMap(rows, categories, engine="pycocotools")(predictions)


def test_predictions_of_an_unknown_image_are_an_error() -> None:
    coco, predictions = synthetic(3, seed=9)
    unknown = instances_from(123456, (10, 10), [])
    with pytest.raises(DataError, match=r"3 images only, found image_id 123456\. Score against the split"):
        CocoMap(rows_of(coco), categories_in(coco))([*predictions, unknown])


def test_masks_of_another_size_are_an_error() -> None:
    coco, predictions = synthetic(1, seed=10)
    wrong = instances_from(1000, (4, 4), [(2, 1.0, b"`0")])
    with pytest.raises(DataError, match=r"image_id 1000 at its original size \(\d+, \d+\) .*found \(4, 4\)"):
        CocoMap(rows_of(coco), categories_in(coco))([wrong])
    assert predictions


def test_classes_with_the_same_name_are_scored_separately() -> None:
    coco, predictions = synthetic(3, seed=11, categories=2)
    for category in coco["categories"][:2]:
        category["name"] = "shared"
    metrics = CocoMap(rows_of(coco), categories_in(coco))(predictions)
    assert {"map_class/shared (2)", "map_class/shared (5)"} <= set(metrics)


def test_every_value_is_a_plain_float() -> None:
    coco, predictions = synthetic(3, seed=12)
    metrics = CocoMap(rows_of(coco), categories_in(coco))(predictions)
    assert {type(value) for value in metrics.values()} == {float}
    assert all(np.isfinite(list(metrics.values())))


TABLE = {
    "map": 0.41234,
    "map_50": 0.6,
    "map_small": -1.0,
    "box_map": 0.5,
    "map_class/cat": 0.1,
    "map_class/zebra": 1.0,
}


def test_the_table_is_aligned_and_ranks_the_classes() -> None:
    lines = metrics_table(TABLE).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "small", "medium", "large", "AR100"]
    assert lines[1].split() == ["masks", "41.2", "60.0", "-", "-", "-", "-", "-"]
    assert lines[2].split()[:2] == ["boxes", "50.0"]
    assert [line.split() for line in lines[4:]] == [["class", "AP"], ["zebra", "100.0"], ["cat", "10.0"]]
    assert len({len(line) for line in lines[:3]}) == 1


def test_the_table_has_a_row_for_boundaries_where_they_were_scored() -> None:
    lines = metrics_table(TABLE | {"boundary_map": 0.3}).splitlines()
    assert lines[3].split()[:2] == ["boundary", "30.0"]


def test_the_table_explains_the_figures_without_cocos_limit() -> None:
    lines = metrics_table(TABLE | {"unlimited_map": 0.5}).splitlines()
    assert lines[3].split()[:3] == ["no", "limit", "50.0"]
    assert "all predictions" in lines[5]
    assert "no limit" not in metrics_table(TABLE)


def test_the_table_reads_the_trainers_prefixed_metrics() -> None:
    assert metrics_table({f"eval_{key}": value for key, value in TABLE.items()}, "eval_") == metrics_table(TABLE)


def test_control_characters_of_a_class_name_are_not_printed() -> None:
    table = metrics_table({"map_class/a\x1b[2J": 0.5, "map_class/b\nc": 0.25})
    assert [line.split() for line in table.splitlines()[4:]] == [["class", "AP"], ["a?[2J", "50.0"], ["b?c", "25.0"]]


def test_a_long_name_of_a_class_is_cut_in_the_table() -> None:
    table = metrics_table({"map": 0.5, "map_class/" + "x" * 300: 0.25, "map_class/cell": 0.75}).splitlines()
    assert [line.split() for line in table[-2:]] == [["cell", "75.0"], ["x" * 37 + "...", "25.0"]]
    assert max(map(len, table)) < 120
