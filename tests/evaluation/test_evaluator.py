"""Errors, thresholds, confusion and calibration, against tidecv and images small enough to calculate by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.evaluation.overlaps import image_overlaps
from m2f_trainer.inference.instances import Instances
from m2f_trainer.masks.segmentation import decode
from m2f_trainer.run_folder import read_details, write_classes, write_details
from tests.evaluation.bars import evaluate, picture, predicted_bars
from tests.evaluation.truth import categories_in, dense_image, instances_from, perfect, rows_of, synthetic


def test_perfect_predictions_have_no_errors_and_worst_images_come_first() -> None:
    coco, found = synthetic(12, seed=3)
    rows = rows_of(coco)
    evaluator = Evaluator(rows, categories_in(coco))
    figures = evaluator(perfect(rows))
    assert figures["boundary_map"] == pytest.approx(1)
    assert not any(one["count"] for one in evaluator.details["errors"].values())
    assert {one["quality"] for one in evaluator.details["images"]} == {1.0}
    evaluator(found)
    shown = evaluator.details["shown"]
    assert 4 <= len(shown["worst"]) <= 6
    assert max(one["quality"] for one in shown["worst"]) <= min(one["quality"] for one in shown["best"])
    assert not {one["image_id"] for one in shown["worst"]} & {one["image_id"] for one in shown["best"]}
    least = {row["id"]: row["threshold"] for row in evaluator.details["classes"]}
    results = [entry for one in shown["best"] for entry in one["predictions"]]
    assert results
    assert all(entry["score"] >= least[entry["category_id"]] for entry in results)


def test_precision_and_recall_curves_average_to_the_figures() -> None:
    coco, found = synthetic(20, seed=5)
    evaluator = Evaluator(rows_of(coco), categories_in(coco))
    figures = evaluator(found)
    curves = evaluator.details["precision_recall"]
    assert np.mean(curves["mean"]["0.5"]) == pytest.approx(figures["map_50"], abs=1e-4)
    assert np.mean(curves["mean"]["0.75"]) == pytest.approx(figures["map_75"], abs=1e-4)
    assert curves["classes"][-1] is None, "a class without any object has no curve"


def test_a_split_without_objects_or_predictions_is_evaluated() -> None:
    assert evaluate(picture([]), [])["errors"]["missed"] == {"count": 0, "cost": 0.0}
    result = evaluate(picture([]), predicted_bars((3, 0.5, 0, 20)))
    assert result["errors"]["background"]["count"] == 1
    assert result["precision_recall"]["mean"]["0.5"] == []


def test_an_image_with_more_than_256_predictions_is_evaluated() -> None:
    result = evaluate(picture([(3, 0, 20)]), predicted_bars(*((3, 1 - number / 1000, 0, 20) for number in range(300))))
    assert result["errors"]["missed"]["count"] == 0


def noisy(coco: dict[str, Any], seed: int) -> list[Instances]:
    """The objects of one image with random scores, some shortened, and as many wrong predictions, best first."""
    generator, found = np.random.default_rng(seed), []
    size = tuple(coco["annotations"][0]["segmentation"]["size"])
    for item in coco["annotations"]:
        mask = decode(item["segmentation"]["counts"], *size)
        mask[: generator.integers(0, 9)] = 0
        found.append((item["category_id"], generator.random(), coco_mask.encode(np.asfortranarray(mask))["counts"]))
        wrong = coco_mask.encode(np.asfortranarray(np.roll(mask, 1, 1)))["counts"]
        found.append((item["category_id"], 0.8 * generator.random(), wrong))
    return [instances_from(1, size, sorted(found, key=lambda one: -one[1]))]


def of_pycocotools(coco: dict[str, Any], results: list[dict[str, Any]], limit: int) -> dict[str, float]:
    truth = COCO()
    truth.dataset = coco
    truth.createIndex()
    scorer = COCOeval(truth, truth.loadRes(results), "segm")
    scorer.params.maxDets = [1, 10, limit]
    scorer.evaluate()
    scorer.accumulate()
    precision = scorer.eval["precision"]
    values = {"map": precision[:, :, :, 0, 2], "map_50": precision[0, :, :, 0, 2], "map_small": precision[..., 1, 2]}
    values |= {f"map_class/c{k + 1}": precision[:, :, k, 0, 2] for k in range(precision.shape[2])}
    return {name: float(np.mean(part[part > -1])) for name, part in values.items()}


@pytest.mark.parametrize("categories", [1, 3])
def test_a_dense_image_is_scored_with_and_without_cocos_limit_of_100(categories: int) -> None:
    coco = dense_image(150, categories)
    (found,) = noisy(coco, seed=categories)
    evaluator = Evaluator(rows_of(coco), categories_in(coco))
    figures = evaluator([found])
    for prefix, results, limit in (("", found.to_coco()[:100], 100), ("unlimited_", found.to_coco(), 1000)):
        for name, value in of_pycocotools(coco, results, limit).items():
            assert figures[prefix + name] == pytest.approx(value, abs=1e-9), prefix + name
    assert figures["unlimited_map"] > figures["map"] + 0.05
    limited = evaluator([found.best(100)])
    official = [name for name in figures if not name.startswith("unlimited_")]
    assert [figures[name] for name in official] == pytest.approx([limited[name] for name in official], abs=1e-12)


def test_the_diagnostics_of_a_dense_image_count_all_predictions() -> None:
    coco = dense_image(150, 1)
    evaluator = Evaluator(rows_of(coco), categories_in(coco))
    figures = evaluator(perfect(rows_of(coco)))
    assert figures["mar_100"] == pytest.approx(100 / 150)
    assert figures["unlimited_map"] == pytest.approx(1)
    assert evaluator.details["errors"]["missed"]["count"] == 0
    assert evaluator.details["classes"][0]["recall"] == 1


@pytest.mark.parametrize("at_once", [1, 7, 300])
def test_the_overlaps_do_not_depend_on_how_many_predictions_are_compared_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco = dense_image(150, 3)
    scorer, found = CocoMap(rows_of(coco), categories_in(coco)), noisy(coco, seed=5)
    (expected,) = image_overlaps(scorer, found)
    monkeypatch.setattr("m2f_trainer.evaluation.overlaps.PREDICTIONS_AT_ONCE", at_once)
    (image,) = image_overlaps(scorer, found)
    assert len(expected.pairs) > 100
    for name in ("pairs", "overlaps", "boundaries"):
        assert np.array_equal(getattr(image, name), getattr(expected, name)), name


def test_without_dense_images_there_are_no_figures_without_the_limit() -> None:
    coco = dense_image(100, 1)
    figures = Evaluator(rows_of(coco), categories_in(coco))(perfect(rows_of(coco)))
    assert figures["map"] == pytest.approx(1)
    assert not [name for name in figures if name.startswith("unlimited_")]


def test_details_and_classes_are_written_for_programs_and_spreadsheets(tmp_path: Path) -> None:
    details = evaluate(picture([(3, 0, 20)]), predicted_bars((3, 0.9, 0, 20)))
    write_details(details, tmp_path / "evaluation.json")
    assert read_details(tmp_path) == json.loads(json.dumps(details)) == details
    assert read_details(tmp_path / "nowhere") == {}
    write_classes(details, tmp_path / "classes.csv")
    cat, dog = csv.DictReader((tmp_path / "classes.csv").read_text().splitlines())
    assert (cat["name"], float(cat["ap50"]), cat["kept"]) == ("cat", pytest.approx(1), "1")
    assert dog["name"] == "'=dog", "a formula is written as text"
