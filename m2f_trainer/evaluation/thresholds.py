"""The best score threshold of each class, and with it the confusion matrix, calibration and quality of each image.

Everything is measured at IoU 0.5. The threshold of a class is the score with the highest F1. Predictions with at least
that score are "kept".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.evaluation.overlaps import MATCH_IOU, ImageOverlaps
from m2f_trainer.evaluation.tide import HIT, IGNORED, ImageErrors, ScoredPredictions
from m2f_trainer.inference.predictor import DEFAULT_THRESHOLD

BINS = 10
BACKGROUND_CLASS = -1  # the predicted class of a missed object, and the object class of a false positive


@dataclass(frozen=True)
class ThresholdStats:
    """Results of one class at its best threshold.

    Attributes:
        objects: number of objects, without crowd regions.
        kept: number of predictions with at least the threshold's score.
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    objects: int
    kept: int


def best_thresholds(predictions: ScoredPredictions) -> list[ThresholdStats]:
    """The threshold with the highest F1 for each class.

    A class without correct predictions has threshold 1 and keeps no prediction.
    """
    return [_best(predictions, one, int(truths)) for one, truths in enumerate(predictions.truths.tolist())]


def class_thresholds(details: Mapping[str, Any], category_ids: Sequence[int]) -> list[float] | None:
    """The best threshold of each category from the details of an evaluation; None without details.

    It is 0.5 for a category that was not scored or has no correct prediction. Others are rounded down to four decimals,
    below the best score itself, since predictions must score above a threshold.
    """
    best = {row["id"]: _below(row["threshold"]) for row in details.get("classes", []) if row["kept"]}
    return [best.get(one, DEFAULT_THRESHOLD) for one in category_ids] if details else None


def _below(score: float) -> float:
    """The highest number of four decimals that is less than `score`."""
    number = math.floor(1e4 * score) / 1e4
    return number if number < score else round(number - 1e-4, 4)


def _best(predictions: ScoredPredictions, one: int, truths: int) -> ThresholdStats:
    mine = np.flatnonzero(predictions.classes == one)
    mine = mine[np.argsort(-predictions.scores[mine], kind="stable")]
    if not len(mine) or not truths or not (predictions.kinds[mine] == HIT).any():
        return ThresholdStats(1.0, 0.0, 0.0, 0.0, truths, 0)
    scores, right = predictions.scores[mine], np.cumsum(predictions.kinds[mine] == HIT)
    f1 = 2 * right / (np.arange(1, len(mine) + 1) + truths)
    f1[:-1][scores[1:] == scores[:-1]] = -1  # a threshold cannot separate equal scores
    best = int(np.argmax(f1))
    kept, found = best + 1, int(right[best])
    return ThresholdStats(float(scores[best]), found / kept, found / truths, float(f1[best]), truths, kept)


def calibration(predictions: ScoredPredictions) -> dict[str, Any]:
    """Reliability of the scores in ten bins: number of predictions, their mean score, and the share that is correct.

    `error` is the expected calibration error (Guo et al., ICML 2017): the mean absolute difference between mean score
    and share correct, weighted by the number of predictions.
    """
    places = np.minimum((predictions.scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(places, minlength=BINS)
    total = np.maximum(counts, 1)
    mean = np.bincount(places, predictions.scores, BINS) / total
    share = np.bincount(places, (predictions.kinds == HIT).astype(np.float64), BINS) / total
    error = float((counts * np.abs(mean - share)).sum() / max(1, counts.sum()))
    return {"count": counts.tolist(), "score": mean.tolist(), "correct": share.tolist(), "error": error}


def confusion_counts(image: ImageOverlaps, errors: ImageErrors, kept: NDArray[np.bool_]) -> Counter[tuple[int, int]]:
    """(object's class, predicted class) -> count over the kept predictions; `BACKGROUND_CLASS` on either side.

    A correct prediction is counted with its object. Each other prediction, by descending score, is counted with the
    unassigned object of another class that it overlaps most, if their IoU is at least 0.5, and otherwise with the
    background. The remaining objects are counted with the background as predicted class.
    """
    counts: Counter[tuple[int, int]] = Counter()
    taken = set(errors.objects[kept & (errors.kinds == HIT)].tolist())
    near: dict[int, list[tuple[float, int]]] = {}
    for (prediction, number), value in zip(image.pairs.tolist(), image.overlaps.tolist(), strict=True):
        if value >= MATCH_IOU and not image.crowd[number]:
            near.setdefault(prediction, []).append((value, number))
    for prediction in np.flatnonzero(kept & (errors.kinds != IGNORED)).tolist():
        predicted = int(image.predicted[prediction])
        if errors.kinds[prediction] == HIT:
            counts[predicted, predicted] += 1
            continue
        free = [(value, number) for value, number in near.get(prediction, []) if number not in taken]
        number = max(free, default=(0.0, -1))[1]
        taken.add(number)
        counts[int(image.truth[number]) if number >= 0 else BACKGROUND_CLASS, predicted] += 1
    for number in np.flatnonzero(~image.crowd).tolist():
        if number not in taken:
            counts[int(image.truth[number]), BACKGROUND_CLASS] += 1
    return counts


def image_quality(image: ImageOverlaps, errors: ImageErrors, kept: NDArray[np.bool_]) -> dict[str, float | int]:
    """Found objects, wrong predictions and missed objects of one image, and its panoptic quality.

    Quality is sum of IoU / (found + (wrong + missed) / 2) (Kirillov et al., CVPR 2019). For an image without objects it
    is 1 if no prediction was kept, else 0.
    """
    hits = np.flatnonzero(kept & (errors.kinds == HIT))
    ious = {tuple(pair): value for pair, value in zip(image.pairs.tolist(), image.overlaps.tolist(), strict=True)}
    total = sum(ious[int(one), int(errors.objects[one])] for one in hits)
    wrong = int((kept & (errors.kinds != HIT) & (errors.kinds != IGNORED)).sum())
    missed = int((~image.crowd).sum()) - len(hits)
    whole = len(hits) + (wrong + missed) / 2
    quality = total / whole if whole else 1.0
    return {
        "image_id": image.image_id,
        "quality": float(quality),
        "found": len(hits),
        "wrong": wrong,
        "missed": missed,
    }


def above_threshold(image: ImageOverlaps, thresholds: Sequence[ThresholdStats]) -> NDArray[np.bool_]:
    """(n,) bool: predictions with at least the threshold score of their class."""
    lowest = np.array([one.threshold if one.kept else np.inf for one in thresholds])
    return np.asarray(image.scores >= lowest[image.predicted], np.bool_)
