"""The six error types of TIDE (Bolya et al., ECCV 2020), with foreground IoU 0.5 and background IoU 0.1.

A false positive is one of: *class* (IoU of at least 0.5 with an object of another class), *localisation* (IoU of 0.1 to
0.5 with an object of its class), *both* (IoU of 0.1 to 0.5 with an object of another class), *duplicate* (IoU of at
least 0.5 with an object that a prediction with a higher score matched), *background* (IoU of at most 0.1 with every
object). An object is *missed* if it is unmatched and no class or localisation error refers to it. The cost of an error
type is the AP50 that the model would gain if that type alone were corrected. Predictions matched to crowd regions are
ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.evaluation.coco import mean_of_present
from m2f_trainer.evaluation.matching import average_precision, candidates, greedy_match
from m2f_trainer.evaluation.overlaps import BACKGROUND_IOU, MATCH_IOU, ImageOverlaps

HIT, IGNORED, CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(7)
ERRORS = {"class": CLASS, "localisation": LOCALISATION, "both": BOTH, "duplicate": DUPLICATE, "background": BACKGROUND}


@dataclass(frozen=True, eq=False)
class ImageErrors:
    """The outcome of each prediction of one image.

    Attributes:
        kinds: (n,) int64: HIT, IGNORED or an error type.
        objects: (n,) int64: index of the matched object, or of the object that an error refers to; -1 if there is none.
        found: (m,) bool: objects matched by a prediction.
    """

    kinds: NDArray[np.int64]
    objects: NDArray[np.int64]
    found: NDArray[np.bool_]


def classify_predictions(image: ImageOverlaps) -> ImageErrors:
    """Match predictions to objects at IoU 0.5 and find the error type of each unmatched prediction."""
    matched = greedy_match(candidates(image, image.overlaps, image.crowd), MATCH_IOU, image.crowd, image.crowd)
    found = np.zeros(len(image.truth), np.bool_)
    found[[number for number in matched.values() if not image.crowd[number]]] = True
    kinds = np.full(len(image.predicted), BACKGROUND, np.int64)
    objects = np.full(len(image.predicted), -1, np.int64)
    near: dict[int, list[tuple[float, int]]] = {}
    for (prediction, number), value in zip(image.pairs.tolist(), image.overlaps.tolist(), strict=True):
        if not image.crowd[number] and value > BACKGROUND_IOU:
            near.setdefault(prediction, []).append((value, number))
    for prediction, row in near.items():
        kinds[prediction], objects[prediction] = _error_type(int(image.predicted[prediction]), row, image.truth)
    for prediction, number in matched.items():
        kinds[prediction], objects[prediction] = IGNORED if image.crowd[number] else HIT, number
    return ImageErrors(kinds, objects, found)


def _error_type(mine: int, row: Sequence[tuple[float, int]], truth: NDArray[np.int64]) -> tuple[int, int]:
    """The error type of a prediction of class `mine` and its object, from the (IoU, object) pairs it overlaps."""
    own = max(((value, number) for value, number in row if truth[number] == mine), default=(0.0, -1))
    other = max(((value, number) for value, number in row if truth[number] != mine), default=(0.0, -1))
    if BACKGROUND_IOU <= own[0] < MATCH_IOU:
        return LOCALISATION, own[1]
    if other[0] >= MATCH_IOU:
        return CLASS, other[1]
    if own[0] >= MATCH_IOU:
        return DUPLICATE, own[1]
    return BOTH, -1


@dataclass(frozen=True, eq=False)
class ScoredPredictions:
    """The p predictions of all images that are not ignored, and the object counts of the K classes.

    Attributes:
        classes: (p,) int64 predicted class.
        scores: (p,) float64.
        kinds: (p,) int64: HIT or an error type.
        corrected_class: (p,) int64: for a class or localisation error the class of its object, which makes the
            prediction correct. -1 if correcting the error removes the prediction: its object is already matched, or
            an earlier error of the image is corrected to it.
        truths: (K,) int64 objects.
        missed: (K,) int64 unmatched objects that no class or localisation error refers to.
    """

    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    kinds: NDArray[np.int64]
    corrected_class: NDArray[np.int64]
    truths: NDArray[np.int64]
    missed: NDArray[np.int64]


def collect_predictions(
    images: Sequence[ImageOverlaps], image_errors: Sequence[ImageErrors], num_classes: int
) -> ScoredPredictions:
    """Concatenate the predictions of all images, without the ignored ones."""
    truths, missed = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    corrected, classes, scores, kinds = ([np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)], [])
    for image, errors in zip(images, image_errors, strict=True):
        mine, covered = _corrected_classes(image, errors)
        np.add.at(truths, image.truth[~image.crowd], 1)
        np.add.at(missed, image.truth[~image.crowd & ~errors.found & ~covered], 1)
        kept = errors.kinds != IGNORED
        corrected.append(mine[kept])
        classes.append(image.predicted[kept])
        scores.append(image.scores[kept])
        kinds.append(errors.kinds[kept])
    all_kinds = np.concatenate([np.zeros(0, np.int64), *kinds])
    return ScoredPredictions(
        np.concatenate(classes), np.concatenate(scores), all_kinds, np.concatenate(corrected), truths, missed
    )


def _corrected_classes(image: ImageOverlaps, errors: ImageErrors) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(n,) the class that corrects each prediction, or -1; (m,) whether such a prediction refers to each object."""
    corrected = np.full(len(image.predicted), -1, np.int64)
    covered = np.zeros(len(image.truth), np.bool_)
    for prediction in np.flatnonzero(np.isin(errors.kinds, (CLASS, LOCALISATION))).tolist():
        number = errors.objects[prediction]
        if not errors.found[number] and not covered[number]:
            covered[number] = True
            corrected[prediction] = image.truth[number]
    return corrected, covered


def tide_errors(predictions: ScoredPredictions) -> dict[str, dict[str, float]]:
    """Error type -> its count, and its cost: the AP50 (0 to 1) gained if this type alone were corrected."""
    before = _ap50(predictions.classes, predictions.scores, predictions.kinds == HIT, predictions.truths)
    table: dict[str, dict[str, float]] = {}
    for name, kind in ERRORS.items():
        kept = (predictions.kinds != kind) | (predictions.corrected_class >= 0)
        right = (predictions.kinds == HIT) | (predictions.kinds == kind)
        classes = np.where((predictions.kinds == kind) & kept, predictions.corrected_class, predictions.classes)
        after = _ap50(classes[kept], predictions.scores[kept], right[kept], predictions.truths)
        table[name] = {"count": int((predictions.kinds == kind).sum()), "cost": max(after - before, 0.0)}
    after = _ap50(
        predictions.classes, predictions.scores, predictions.kinds == HIT, predictions.truths - predictions.missed
    )
    table["missed"] = {"count": int(predictions.missed.sum()), "cost": max(after - before, 0.0)}
    return table


def _ap50(
    classes: NDArray[np.int64], scores: NDArray[np.float64], right: NDArray[np.bool_], truths: NDArray[np.int64]
) -> float:
    """Mean AP50 over the classes that have objects; 0 if there are none."""
    values = [
        average_precision(scores[mine], right[mine][:, None], int(truths[one])).mean()
        for one in np.flatnonzero(truths).tolist()
        for mine in [np.flatnonzero(classes == one)]
    ]
    return max(0.0, mean_of_present(np.array(values)))
