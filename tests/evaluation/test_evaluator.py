"""Errors, thresholds, confusion and calibration, against tidecv and images small enough to calculate by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.run_folder import read_details, write_classes, write_details
from tests.evaluation.bars import evaluate, picture, predicted_bars
from tests.evaluation.truth import categories_in, perfect, rows_of, synthetic


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


def test_details_and_classes_are_written_for_programs_and_spreadsheets(tmp_path: Path) -> None:
    details = evaluate(picture([(3, 0, 20)]), predicted_bars((3, 0.9, 0, 20)))
    write_details(details, tmp_path / "evaluation.json")
    assert read_details(tmp_path) == json.loads(json.dumps(details)) == details
    assert read_details(tmp_path / "nowhere") == {}
    write_classes(details, tmp_path / "classes.csv")
    cat, dog = csv.DictReader((tmp_path / "classes.csv").read_text().splitlines())
    assert (cat["name"], float(cat["ap50"]), cat["kept"]) == ("cat", pytest.approx(1), "1")
    assert dog["name"] == "'=dog", "a formula is written as text"
