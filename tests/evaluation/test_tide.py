"""Error types and what each costs, against tidecv and by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.evaluation.overlaps import image_overlaps
from m2f_trainer.evaluation.tide import classify_predictions, collect_predictions, tide_errors
from tests.evaluation.bars import evaluate, picture, predicted_bars
from tests.evaluation.truth import categories_in, rows_of, synthetic

TIDECV = {
    0: {"class": (36, 11.127), "localisation": (30, 9.309), "both": (4, 0.932), "duplicate": (38, 3.277),
        "background": (43, 3.401), "missed": (64, 14.362)},
    4: {"class": (34, 10.093), "localisation": (30, 7.797), "both": (2, 0.051), "duplicate": (34, 1.150),
        "background": (41, 3.813), "missed": (80, 18.512)},
}  # fmt: skip
"""Count and cost (AP50 in points) that tidecv 1.0.1, the authors' code, returns for `synthetic(40, seed)`.

The annotations have no crowd regions, and the scores are those of the test below."""


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
