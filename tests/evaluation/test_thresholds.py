"""Best thresholds, confusion and calibration, calculated by hand."""

from __future__ import annotations

import pytest

from m2f_trainer.evaluation.thresholds import class_thresholds
from tests.evaluation.bars import evaluate, picture, predicted_bars


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


def test_predictions_at_the_best_threshold_of_their_class_are_above_the_one_that_a_model_stores() -> None:
    coco = picture([(3, 0, 20), (3, 40, 60)])
    details = evaluate(coco, predicted_bars((3, 0.9, 0, 20), (3, 0.61234, 40, 60), (3, 0.61, 150, 160)))
    assert class_thresholds(details, [3, 8]) == [0.6123, 0.5], "nothing was found of the other class"
    assert class_thresholds(details, [8, 5, 3]) == [0.5, 0.5, 0.6123], "in the order of the model, which has one more"
    assert class_thresholds({}, [3, 8]) is None


def test_a_stored_threshold_is_below_the_best_score_whatever_its_decimals() -> None:
    scores = [number / 10000 for number in range(1, 10001)] + [0.61234, 0.99995, 1e-5]
    for score in scores:
        (stored,) = class_thresholds({"classes": [{"id": 1, "threshold": score, "kept": 1}]}, [1]) or []
        assert 0 < score - stored < 1.01e-4, score
        assert stored == round(stored, 4)


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


def test_the_quality_of_an_image_is_its_panoptic_quality_above_the_thresholds() -> None:
    coco = picture([(3, 0, 20), (3, 40, 60), (3, 80, 100)])
    found = predicted_bars(
        (3, 0.9, 0, 20), (3, 0.8, 42, 60), (3, 0.7, 150, 160), (3, 0.1, 80, 88)
    )  # IoU 1, IoU 18 / 20, no object, IoU 8 / 20; F1 is highest at 0.8
    (image,) = evaluate(coco, found)["images"]
    assert (image["found"], image["wrong"], image["missed"]) == (2, 0, 1)
    assert image["quality"] == pytest.approx((1 + 18 / 20) / (2 + 1 / 2))
