"""How a model does once a score decides: best threshold of each class, confusion, calibration, quality of each image.

All at IoU 0.5. The threshold of a class is the lowest score of the best F1; predictions at or above it are "kept".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.evaluation.overlaps import MATCH, Scene
from m2f_trainer.evaluation.tide import HIT, IGNORED, Points, Verdict

BINS = 10
NOTHING = -1  # class of the background, as what is there and as what was said


@dataclass(frozen=True)
class Operation:
    """One class at its best threshold."""

    threshold: float
    precision: float
    recall: float
    f1: float
    objects: int
    kept: int


def operations(points: Points) -> list[Operation]:
    """Each class at the score with the best F1; a class without predictions or objects keeps nothing."""
    return [_best(points, one, int(truths)) for one, truths in enumerate(points.truths.tolist())]


def _best(points: Points, one: int, truths: int) -> Operation:
    mine = np.flatnonzero(points.classes == one)
    mine = mine[np.argsort(-points.scores[mine], kind="stable")]
    if not len(mine) or not truths or not (points.kinds[mine] == HIT).any():
        return Operation(1.0, 0.0, 0.0, 0.0, truths, 0)
    scores, right = points.scores[mine], np.cumsum(points.kinds[mine] == HIT)
    f1 = 2 * right / (np.arange(1, len(mine) + 1) + truths)
    f1[:-1][scores[1:] == scores[:-1]] = -1  # a threshold can't part equal scores
    best = int(np.argmax(f1))
    kept, found = best + 1, int(right[best])
    return Operation(float(scores[best]), found / kept, found / truths, float(f1[best]), truths, kept)


def calibration(points: Points) -> dict[str, Any]:
    """Of each tenth of the scores: predictions, their mean score, and the share that is right.

    `error` is the expected calibration error: the mean distance of score and share, weighted by the predictions.
    """
    places = np.minimum((points.scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(places, minlength=BINS)
    total = np.maximum(counts, 1)
    mean = np.bincount(places, points.scores, BINS) / total
    share = np.bincount(places, (points.kinds == HIT).astype(np.float64), BINS) / total
    error = float((counts * np.abs(mean - share)).sum() / max(1, counts.sum()))
    return {"count": counts.tolist(), "score": mean.tolist(), "correct": share.tolist(), "error": error}


def confusion(scene: Scene, verdict: Verdict, kept: NDArray[np.bool_]) -> Counter[tuple[int, int]]:
    """(class of the object, predicted class) -> how often, for the kept predictions; `NOTHING` on either side.

    A prediction that has found its object counts there; the others go, best first, to the object of another class that
    they overlap most and nobody has, from IoU 0.5 on.
    """
    counts: Counter[tuple[int, int]] = Counter()
    taken = set(verdict.objects[kept & (verdict.kinds == HIT)].tolist())
    near: dict[int, list[tuple[float, int]]] = {}
    for (prediction, number), value in zip(scene.pairs.tolist(), scene.overlaps.tolist(), strict=True):
        if value >= MATCH and not scene.crowd[number]:
            near.setdefault(prediction, []).append((value, number))
    for prediction in np.flatnonzero(kept & (verdict.kinds != IGNORED)).tolist():
        said = int(scene.predicted[prediction])
        if verdict.kinds[prediction] == HIT:
            counts[said, said] += 1
            continue
        free = [(value, number) for value, number in near.get(prediction, []) if number not in taken]
        number = max(free, default=(0.0, -1))[1]
        taken.add(number)
        counts[int(scene.truth[number]) if number >= 0 else NOTHING, said] += 1
    for number in np.flatnonzero(~scene.crowd).tolist():
        if number not in taken:
            counts[int(scene.truth[number]), NOTHING] += 1
    return counts


def image_quality(scene: Scene, verdict: Verdict, kept: NDArray[np.bool_]) -> dict[str, float | int]:
    """Found, wrong and missed objects of one image, and its panoptic quality: sum of IoU / (found + half the errors).

    The quality of an image without objects is 1 where nothing was kept, else 0.
    """
    hits = np.flatnonzero(kept & (verdict.kinds == HIT))
    ious = {tuple(pair): value for pair, value in zip(scene.pairs.tolist(), scene.overlaps.tolist(), strict=True)}
    total = sum(ious[int(one), int(verdict.objects[one])] for one in hits)
    wrong = int((kept & (verdict.kinds != HIT) & (verdict.kinds != IGNORED)).sum())
    missed = int((~scene.crowd).sum()) - len(hits)
    whole = len(hits) + (wrong + missed) / 2
    quality = total / whole if whole else 1.0
    return {
        "image_id": scene.image_id,
        "quality": float(quality),
        "found": len(hits),
        "wrong": wrong,
        "missed": missed,
    }


def kept_of(scene: Scene, chosen: Sequence[Operation]) -> NDArray[np.bool_]:
    """(n,) which predictions reach their class's threshold."""
    least = np.array([one.threshold if one.kept else np.inf for one in chosen])
    return np.asarray(scene.scores >= least[scene.predicted], np.bool_)
