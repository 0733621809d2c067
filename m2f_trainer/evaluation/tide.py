"""Why predictions are wrong and objects are missed: TIDE's six errors (Bolya et al., ECCV 2020), at IoU 0.5 and 0.1.

A false positive is one of: *class* (an object of another class, well outlined), *localisation* (an object of its class,
overlapped by 0.1 to 0.5), *both*, *duplicate* (an object that a better prediction has), *background* (nothing there).
An object is *missed* when neither a class nor a localisation error would find it. What an error costs is the AP50 that
the model would gain without it, each error mended alone. Predictions within crowd regions are no errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.evaluation.coco import mean_of_present
from m2f_trainer.evaluation.matching import average_precision, candidates, pair_up
from m2f_trainer.evaluation.overlaps import LEAST, MATCH, Scene

HIT, IGNORED, CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(7)
ERRORS = {"class": CLASS, "localisation": LOCALISATION, "both": BOTH, "duplicate": DUPLICATE, "background": BACKGROUND}


@dataclass(frozen=True, eq=False)
class Verdict:
    """What one image's predictions are.

    Attributes:
        kinds: (n,) int64: HIT, IGNORED or one of the errors.
        objects: (n,) int64: the object that a prediction found, or, for class and localisation errors, was about; or -1
        found: (m,) bool: objects that a prediction has.
    """

    kinds: NDArray[np.int64]
    objects: NDArray[np.int64]
    found: NDArray[np.bool_]


def judge(scene: Scene) -> Verdict:
    """Match at IoU 0.5, and name the error of each prediction without a match."""
    matched = pair_up(candidates(scene, scene.overlaps, scene.crowd), MATCH, scene.crowd, scene.crowd)
    found = np.zeros(len(scene.truth), np.bool_)
    found[[number for number in matched.values() if not scene.crowd[number]]] = True
    kinds = np.full(len(scene.predicted), BACKGROUND, np.int64)
    objects = np.full(len(scene.predicted), -1, np.int64)
    near: dict[int, list[tuple[float, int]]] = {}
    for (prediction, number), value in zip(scene.pairs.tolist(), scene.overlaps.tolist(), strict=True):
        if not scene.crowd[number] and value > LEAST:
            near.setdefault(prediction, []).append((value, number))
    for prediction, row in near.items():
        kinds[prediction], objects[prediction] = _error(int(scene.predicted[prediction]), row, scene.truth)
    for prediction, number in matched.items():
        kinds[prediction], objects[prediction] = IGNORED if scene.crowd[number] else HIT, number
    return Verdict(kinds, objects, found)


def _error(mine: int, row: Sequence[tuple[float, int]], truth: NDArray[np.int64]) -> tuple[int, int]:
    """The error of a prediction of class `mine` and the object that it is about, from the objects it overlaps."""
    own = max(((value, number) for value, number in row if truth[number] == mine), default=(0.0, -1))
    other = max(((value, number) for value, number in row if truth[number] != mine), default=(0.0, -1))
    if LEAST <= own[0] < MATCH:
        return LOCALISATION, own[1]
    if other[0] >= MATCH:
        return CLASS, other[1]
    if own[0] >= MATCH:
        return DUPLICATE, own[1]
    return BOTH, -1


@dataclass(frozen=True, eq=False)
class Points:
    """The counted predictions of all images.

    `mended` is the class under which a class or localisation error would be right, were it mended, and -1 where it is
    only to be dropped: its object is found, or a better prediction is mended to it.
    """

    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    kinds: NDArray[np.int64]
    mended: NDArray[np.int64]
    truths: NDArray[np.int64]  # (K,) objects
    missed: NDArray[np.int64]  # (K,) objects that no class or localisation error is about


def gather(scenes: Sequence[Scene], verdicts: Sequence[Verdict], num_classes: int) -> Points:
    """All images' predictions behind one another, ignored ones left out."""
    truths, missed = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    mended, classes, scores, kinds = ([np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)], [])
    for scene, verdict in zip(scenes, verdicts, strict=True):
        mine, covered = _mended(scene, verdict)
        np.add.at(truths, scene.truth[~scene.crowd], 1)
        np.add.at(missed, scene.truth[~scene.crowd & ~verdict.found & ~covered], 1)
        kept = verdict.kinds != IGNORED
        mended.append(mine[kept])
        classes.append(scene.predicted[kept])
        scores.append(scene.scores[kept])
        kinds.append(verdict.kinds[kept])
    joined = np.concatenate([np.zeros(0, np.int64), *kinds])
    return Points(np.concatenate(classes), np.concatenate(scores), joined, np.concatenate(mended), truths, missed)


def _mended(scene: Scene, verdict: Verdict) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Per prediction the class that would make it right or -1; per object whether such a prediction is about it."""
    mended = np.full(len(scene.predicted), -1, np.int64)
    covered = np.zeros(len(scene.truth), np.bool_)
    for prediction in np.flatnonzero(np.isin(verdict.kinds, (CLASS, LOCALISATION))).tolist():
        number = verdict.objects[prediction]
        if not verdict.found[number] and not covered[number]:
            covered[number] = True
            mended[prediction] = scene.truth[number]
    return mended, covered


def breakdown(points: Points) -> dict[str, dict[str, float]]:
    """Error -> how many there are, and the AP50 that the model would gain without them."""
    before = _ap50(points.classes, points.scores, points.kinds == HIT, points.truths)
    told: dict[str, dict[str, float]] = {}
    for name, kind in ERRORS.items():
        kept = (points.kinds != kind) | (points.mended >= 0)
        right = (points.kinds == HIT) | (points.kinds == kind)
        classes = np.where((points.kinds == kind) & kept, points.mended, points.classes)
        after = _ap50(classes[kept], points.scores[kept], right[kept], points.truths)
        told[name] = {"count": int((points.kinds == kind).sum()), "cost": max(after - before, 0.0)}
    after = _ap50(points.classes, points.scores, points.kinds == HIT, points.truths - points.missed)
    told["missed"] = {"count": int(points.missed.sum()), "cost": max(after - before, 0.0)}
    return told


def _ap50(
    classes: NDArray[np.int64], scores: NDArray[np.float64], right: NDArray[np.bool_], truths: NDArray[np.int64]
) -> float:
    """The mean over the classes that have truth; 0 where none has."""
    values = [
        average_precision(scores[mine], right[mine][:, None], int(truths[one])).mean()
        for one in np.flatnonzero(truths).tolist()
        for mine in [np.flatnonzero(classes == one)]
    ]
    return max(0.0, mean_of_present(np.array(values)))
