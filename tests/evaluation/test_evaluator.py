"""Errors, thresholds, confusion and calibration, against public figures and scenes small enough to reckon by hand."""

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
from m2f_trainer.evaluation.evaluator import Assessment
from m2f_trainer.evaluation.overlaps import scenes
from m2f_trainer.evaluation.tide import breakdown, gather, judge
from m2f_trainer.inference.instances import Instances
from m2f_trainer.run_folder import read_details, write_classes, write_details
from tests.evaluation.truth import categories_in, instances_from, perfect, rows_of, synthetic

TIDECV = {
    0: {"class": (36, 11.127), "localisation": (30, 9.309), "both": (4, 0.932), "duplicate": (38, 3.277),
        "background": (43, 3.401), "missed": (64, 14.362)},
    4: {"class": (34, 10.093), "localisation": (30, 7.797), "both": (2, 0.051), "duplicate": (34, 1.150),
        "background": (41, 3.813), "missed": (80, 18.512)},
}  # fmt: skip
"""What tidecv 1.0.1, the authors' own code, says of `synthetic(40, seed)` with no crowd and the scores below."""

HEIGHT, WIDTH = 100, 200


def bar(x0: int, x1: int) -> bytes:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[:, x0:x1] = 1
    counts: bytes = coco_mask.encode(mask)["counts"]
    return counts


def picture(objects: list[tuple[int, int, int]], crowd: tuple[int, ...] = ()) -> dict[str, Any]:
    """One image with a bar an object: (category, x0, x1)."""
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


def assess(coco: dict[str, Any], found: list[Instances]) -> dict[str, Any]:
    assessment = Assessment(rows_of(coco), categories_in(coco))
    assessment(found)
    return assessment.details


def said(*entries: tuple[int, float, int, int]) -> list[Instances]:
    """Predictions of the image: (category, score, x0, x1)."""
    ranked = sorted(entries, key=lambda one: -one[1])
    return [instances_from(7, (HEIGHT, WIDTH), [(c, score, bar(x0, x1)) for c, score, x0, x1 in ranked])]


@pytest.mark.parametrize("seed", TIDECV)
def test_the_error_breakdown_is_the_authors_own(seed: int) -> None:
    coco, given = synthetic(40, seed=seed)
    for number, item in enumerate(coco["annotations"], 1):
        item |= {"iscrowd": 0, "id": number}
    draw = np.random.default_rng(seed)
    given = [dataclasses.replace(one, scores=draw.random(len(one.scores))) for one in given]
    scorer = CocoMap(rows_of(coco), categories_in(coco))
    seen = list(scenes(scorer, given))
    told = breakdown(gather(seen, [judge(one) for one in seen], len(scorer.categories)))
    for name, (count, cost) in TIDECV[seed].items():
        assert told[name]["count"] == count, name
        assert 100 * told[name]["cost"] == pytest.approx(cost, abs=6e-4), name


def test_each_error_is_called_by_its_name() -> None:
    coco = picture([(3, 0, 20), (3, 40, 60), (8, 80, 100), (8, 120, 140), (3, 170, 200)], crowd=(4,))
    found = said(
        (3, 0.9, 0, 20),  # right
        (3, 0.8, 0, 19),  # the same again
        (3, 0.7, 40, 46),  # 6 of 20: badly outlined
        (3, 0.6, 80, 100),  # a dog called cat
        (3, 0.5, 134, 140),  # a bit of a dog, called cat
        (8, 0.4, 150, 160),  # nothing there
        (3, 0.3, 171, 180),  # in the crowd
    )
    errors = assess(coco, found)["errors"]
    assert {name: one["count"] for name, one in errors.items()} == {
        "class": 1, "localisation": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 1,
    }  # fmt: skip
    assert errors["localisation"]["cost"] > 0.1


def test_the_confusion_has_a_background_and_leaves_crowds_out() -> None:
    coco = picture([(3, 0, 20), (8, 40, 60), (8, 80, 100), (3, 170, 200)], crowd=(3,))
    found = said((3, 0.9, 0, 20), (8, 0.9, 40, 60), (3, 0.9, 80, 100), (3, 0.9, 120, 140), (3, 0.9, 175, 190))
    table = {(true, guess): count for true, guess, count in assess(coco, found)["confusion"]}
    assert table == {(0, 0): 1, (1, 1): 1, (1, 0): 1, (-1, 0): 1}
    assert assess(coco, [])["confusion"] == [[0, -1, 1], [1, -1, 2]]


def test_the_best_threshold_is_where_f1_is_highest() -> None:
    coco = picture([(3, 0, 20), (3, 40, 60), (3, 80, 100)])
    found = said((3, 0.9, 0, 20), (3, 0.7, 150, 160), (3, 0.6, 40, 60), (3, 0.2, 160, 170), (3, 0.1, 180, 190))
    cat, dog = assess(coco, found)["classes"]
    assert (cat["threshold"], cat["kept"], cat["objects"]) == (0.6, 3, 3)
    assert [cat["precision"], cat["recall"], cat["f1"]] == pytest.approx([2 / 3] * 3)
    assert (dog["name"], dog["kept"], dog["ap"]) == ("=dog", 0, -1)


def test_a_threshold_does_not_part_equal_scores() -> None:
    coco = picture([(3, 0, 20)])
    cat, _ = assess(coco, said((3, 0.5, 0, 20), (3, 0.5, 50, 60), (3, 0.5, 90, 99)))["classes"]
    assert (cat["kept"], cat["precision"]) == (3, pytest.approx(1 / 3))


def test_calibration_counts_predictions_by_score_and_how_many_are_right() -> None:
    coco = picture([(3, 0, 20), (3, 40, 60)])
    found = said((3, 1.0, 0, 20), (3, 0.95, 100, 110), (3, 0.55, 40, 60), (3, 0.51, 120, 130))
    told = assess(coco, found)["calibration"]
    assert told["count"] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert (told["correct"][9], told["correct"][5], told["score"][9]) == (0.5, 0.5, pytest.approx(0.975))
    assert told["error"] == pytest.approx((2 * 0.475 + 2 * 0.03) / 4)


def test_perfect_predictions_have_no_errors_and_worst_images_come_first() -> None:
    coco, found = synthetic(12, seed=3)
    rows = rows_of(coco)
    assessment = Assessment(rows, categories_in(coco))
    figures = assessment(perfect(rows))
    assert figures["boundary_map"] == pytest.approx(1)
    assert not any(one["count"] for one in assessment.details["errors"].values())
    assert {one["quality"] for one in assessment.details["images"]} == {1.0}
    assessment(found)
    shown = assessment.details["shown"]
    assert 4 <= len(shown["worst"]) <= 6
    assert max(one["quality"] for one in shown["worst"]) <= min(one["quality"] for one in shown["best"])
    assert not {one["image_id"] for one in shown["worst"]} & {one["image_id"] for one in shown["best"]}
    least = {row["id"]: row["threshold"] for row in assessment.details["classes"]}
    results = [entry for one in shown["best"] for entry in one["predictions"]]
    assert results
    assert all(entry["score"] >= least[entry["category_id"]] for entry in results)


def test_precision_and_recall_curves_average_to_the_figures() -> None:
    coco, found = synthetic(20, seed=5)
    assessment = Assessment(rows_of(coco), categories_in(coco))
    figures = assessment(found)
    curves = assessment.details["precision_recall"]
    assert np.mean(curves["mean"]["0.5"]) == pytest.approx(figures["map_50"], abs=1e-4)
    assert np.mean(curves["mean"]["0.75"]) == pytest.approx(figures["map_75"], abs=1e-4)
    assert curves["classes"][-1] is None, "a class without any object has no curve"


def test_a_split_without_objects_or_predictions_is_assessed_too() -> None:
    assert assess(picture([]), [])["errors"]["missed"] == {"count": 0, "cost": 0.0}
    told = assess(picture([]), said((3, 0.5, 0, 20)))
    assert told["errors"]["background"]["count"] == 1
    assert told["precision_recall"]["mean"]["0.5"] == []


def test_more_predictions_of_one_image_than_a_byte_counts_are_assessed() -> None:
    told = assess(picture([(3, 0, 20)]), said(*((3, 1 - number / 1000, 0, 20) for number in range(300))))
    assert told["errors"]["missed"]["count"] == 0


def test_details_and_classes_are_written_for_programs_and_spreadsheets(tmp_path: Path) -> None:
    details = assess(picture([(3, 0, 20)]), said((3, 0.9, 0, 20)))
    write_details(details, tmp_path / "evaluation.json")
    assert read_details(tmp_path) == json.loads(json.dumps(details)) == details
    assert read_details(tmp_path / "nowhere") == {}
    write_classes(details, tmp_path / "classes.csv")
    cat, dog = csv.DictReader((tmp_path / "classes.csv").read_text().splitlines())
    assert (cat["name"], float(cat["ap50"]), cat["kept"]) == ("cat", pytest.approx(1), "1")
    assert dog["name"] == "'=dog", "a formula stays text"
