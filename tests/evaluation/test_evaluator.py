"""Errors, thresholds, confusion and calibration, against tidecv and images small enough to calculate by hand."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.evaluation.overlaps import image_overlaps
from m2f_trainer.evaluation.tide import classify_predictions, collect_predictions, tide_errors
from m2f_trainer.inference.instances import Instances
from m2f_trainer.run_folder import read_details, write_classes, write_details
from tests.evaluation.truth import categories_in, instances_from, perfect, rows_of, synthetic

TIDECV = {
    0: {"class": (36, 11.127), "localisation": (30, 9.309), "both": (4, 0.932), "duplicate": (38, 3.277),
        "background": (43, 3.401), "missed": (64, 14.362)},
    4: {"class": (34, 10.093), "localisation": (30, 7.797), "both": (2, 0.051), "duplicate": (34, 1.150),
        "background": (41, 3.813), "missed": (80, 18.512)},
}  # fmt: skip
"""Count and cost (AP50 in points) that tidecv 1.0.1, the authors' code, returns for `synthetic(40, seed)`.

The annotations have no crowd regions, and the scores are those of the test below."""

HEIGHT, WIDTH = 100, 200


def bar(x0: int, x1: int) -> bytes:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[:, x0:x1] = 1
    counts: bytes = coco_mask.encode(mask)["counts"]
    return counts


def picture(objects: list[tuple[int, int, int]], crowd: tuple[int, ...] = ()) -> dict[str, Any]:
    """One image whose objects are vertical bars: (category, x0, x1)."""
    coco: dict[str, Any] = {"images": [{"id": 7, "height": HEIGHT, "width": WIDTH, "file_name": "a.png"}]}
    coco["categories"] = [{"id": 3, "name": "cat"}, {"id": 8, "name": "=dog"}]
    coco["annotations"] = [
        {
            "id": number, "image_id": 7, "category_id": category, "iscrowd": int(number in crowd),
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": bar(x0, x1).decode()},
            "bbox": [x0, 0, x1 - x0, HEIGHT], "area": (x1 - x0) * HEIGHT,
        }
        for number, (category, x0, x1) in enumerate(objects)
    ]  # fmt: skip
    return coco


def evaluate(coco: dict[str, Any], found: list[Instances]) -> dict[str, Any]:
    evaluator = Evaluator(rows_of(coco), categories_in(coco))
    evaluator(found)
    return evaluator.details


def predicted_bars(*entries: tuple[int, float, int, int]) -> list[Instances]:
    """Predictions of the image: (category, score, x0, x1)."""
    ranked = sorted(entries, key=lambda one: -one[1])
    return [instances_from(7, (HEIGHT, WIDTH), [(c, score, bar(x0, x1)) for c, score, x0, x1 in ranked])]


@pytest.mark.parametrize("seed", TIDECV)
def test_errors_and_their_costs_equal_tidecv(seed: int) -> None:
    coco, given = synthetic(40, seed=seed)
    for number, item in enumerate(coco["annotations"], 1):
        item |= {"iscrowd": 0, "id": number}
    draw = np.random.default_rng(seed)
    given = [dataclasses.replace(one, scores=draw.random(len(one.scores))) for one in given]
    scorer = CocoMap(rows_of(coco), categories_in(coco))
    images = list(image_overlaps(scorer, given))
    errors = [classify_predictions(image) for image in images]
    found = tide_errors(collect_predictions(images, errors, len(scorer.categories)))
    for name, (count, cost) in TIDECV[seed].items():
        assert found[name]["count"] == count, name
        assert 100 * found[name]["cost"] == pytest.approx(cost, abs=6e-4), name


def test_each_error_type_is_recognised() -> None:
    coco = picture([(3, 0, 20), (3, 40, 60), (8, 80, 100), (8, 120, 140), (3, 170, 200)], crowd=(4,))
    found = predicted_bars(
        (3, 0.9, 0, 20),  # right
        (3, 0.8, 0, 19),  # the same object again
        (3, 0.7, 40, 46),  # IoU 6 / 20 with its object
        (3, 0.6, 80, 100),  # a dog predicted as cat
        (3, 0.5, 134, 140),  # IoU 6 / 20 with a dog, predicted as cat
        (8, 0.4, 150, 160),  # no object
        (3, 0.3, 171, 180),  # inside the crowd region
    )
    errors = evaluate(coco, found)["errors"]
    assert {name: one["count"] for name, one in errors.items()} == {
        "class": 1, "localisation": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 1,
    }  # fmt: skip
    assert errors["localisation"]["cost"] > 0.1


def test_the_confusion_has_a_background_and_ignores_crowd_regions() -> None:
    coco = picture([(3, 0, 20), (8, 40, 60), (8, 80, 100), (3, 170, 200)], crowd=(3,))
    found = predicted_bars((3, 0.9, 0, 20), (8, 0.9, 40, 60), (3, 0.9, 80, 100), (3, 0.9, 120, 140), (3, 0.9, 175, 190))
    table = {(true, guess): count for true, guess, count in evaluate(coco, found)["confusion"]}
    assert table == {(0, 0): 1, (1, 1): 1, (1, 0): 1, (-1, 0): 1}
    assert evaluate(coco, [])["confusion"] == [[0, -1, 1], [1, -1, 2]]


def test_the_best_threshold_is_where_f1_is_highest() -> None:
    coco = picture([(3, 0, 20), (3, 40, 60), (3, 80, 100)])
    found = predicted_bars(
        (3, 0.9, 0, 20), (3, 0.7, 150, 160), (3, 0.6, 40, 60), (3, 0.2, 160, 170), (3, 0.1, 180, 190)
    )
    cat, dog = evaluate(coco, found)["classes"]
    assert (cat["threshold"], cat["kept"], cat["objects"]) == (0.6, 3, 3)
    assert [cat["precision"], cat["recall"], cat["f1"]] == pytest.approx([2 / 3] * 3)
    assert (dog["name"], dog["kept"], dog["ap"]) == ("=dog", 0, -1)


def test_a_threshold_does_not_separate_equal_scores() -> None:
    coco = picture([(3, 0, 20)])
    cat, _ = evaluate(coco, predicted_bars((3, 0.5, 0, 20), (3, 0.5, 50, 60), (3, 0.5, 90, 99)))["classes"]
    assert (cat["kept"], cat["precision"]) == (3, pytest.approx(1 / 3))


def test_calibration_counts_predictions_per_score_bin_and_the_correct_ones() -> None:
    coco = picture([(3, 0, 20), (3, 40, 60)])
    found = predicted_bars((3, 1.0, 0, 20), (3, 0.95, 100, 110), (3, 0.55, 40, 60), (3, 0.51, 120, 130))
    result = evaluate(coco, found)["calibration"]
    assert result["count"] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert (result["correct"][9], result["correct"][5], result["score"][9]) == (0.5, 0.5, pytest.approx(0.975))
    assert result["error"] == pytest.approx((2 * 0.475 + 2 * 0.03) / 4)


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
