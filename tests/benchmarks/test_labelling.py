"""Uncertainty of an image, as the labelling benchmark ranks images by it."""

import pytest

from benchmarks.labelling import errors_per_object, score_doubt


def test_uncertainties_are_those_computed_by_hand() -> None:
    assert score_doubt([0.1, 0.4, 0.7], 0.4) == pytest.approx(0.1 + 0.4 + 0.3)
    # threshold 0.4: scores 0.1, 0.4 and 0.7 become probabilities 1/8, 1/2 and 3/4; one object is found, one is added
    assert errors_per_object([0.1, 0.4, 0.7], 0.4) == pytest.approx((1 / 8 + 1 / 2 + 1 / 4) / 2)


def test_many_certain_objects_do_not_make_an_image_uncertain() -> None:
    certain, doubtful = [0.9] * 100, [0.4, 0.35, 0.45]
    assert errors_per_object(certain, 0.4) < errors_per_object(doubtful, 0.4)
    assert score_doubt(certain, 0.4) > score_doubt(doubtful, 0.4)


def test_an_image_without_predictions_counts_as_certain() -> None:
    assert score_doubt([], 0.4) == errors_per_object([], 0.4) == 0
