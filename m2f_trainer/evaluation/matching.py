"""Match predictions to objects as pycocotools does, from the overlaps of `image_overlaps`, and compute AP.

pycocotools' own matching does not accept precomputed overlaps, such as boundary IoU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.evaluation.coco import LIMITS, mean_of_present
from m2f_trainer.evaluation.overlaps import MATCH_IOU, ImageOverlaps

Overlap = Literal["masks", "boundaries"]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"": (0.0, 1e10), "_small": (0.0, 32.0**2), "_medium": (32.0**2, 96.0**2), "_large": (96.0**2, 1e10)}


@dataclass(frozen=True, eq=False)
class PredictionMatches:
    """The matching results of n predictions, of one image or of several concatenated, for T IoU thresholds.

    Attributes:
        classes: (n,) int64 predicted class.
        scores: (n,) float64.
        hit: (n, 4, T) bool: matched to an object, per area range and IoU threshold.
        ignored: (n, 4, T) bool: neither a true nor a false positive.
        truths: (K, 4) int64: number of objects per class and area range.
    """

    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    hit: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    truths: NDArray[np.int64]


def match_image(
    image: ImageOverlaps, num_classes: int, overlap: Overlap = "masks", limit: int | None = LIMITS[-1]
) -> PredictionMatches:
    """Match one image at every IoU threshold and area range, with at most `limit` predictions per class; None: all."""
    values = image.overlaps if overlap == "masks" else image.boundaries
    kept = np.arange(len(image.predicted)) if limit is None else _first_of_each_class(image.predicted, limit)
    shape = (len(image.predicted), len(AREAS), len(THRESHOLDS))
    hit, ignored = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    truths = np.zeros((num_classes, len(AREAS)), np.int64)
    for index, (low, high) in enumerate(AREAS.values()):
        out = image.crowd | (image.truth_areas < low) | (image.truth_areas > high)
        np.add.at(truths[:, index], image.truth[~out], 1)
        rows = candidates(image, values, out)
        ignored[:, index] = ((image.areas < low) | (image.areas > high))[:, None]
        for number, threshold in enumerate(THRESHOLDS.tolist()):
            for prediction, chosen in greedy_match(rows, threshold, out, image.crowd).items():
                hit[prediction, index, number] = True
                ignored[prediction, index, number] = out[chosen]
    return PredictionMatches(image.predicted[kept], image.scores[kept], hit[kept], ignored[kept], truths)


def _first_of_each_class(classes: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Indices of the first `limit` predictions of each class, ascending."""
    if len(classes) <= limit:
        return np.arange(len(classes))
    return np.sort(np.concatenate([np.flatnonzero(classes == one)[:limit] for one in np.unique(classes)]))


def candidates(
    image: ImageOverlaps, values: NDArray[np.float64], out: NDArray[np.bool_]
) -> dict[int, list[tuple[int, float]]]:
    """Prediction -> (object, overlap) of the objects of its class that it can match; objects in `out` come last."""
    same = image.predicted[image.pairs[:, 0]] == image.truth[image.pairs[:, 1]]
    near = np.flatnonzero(same & (values >= MATCH_IOU - 1e-9))
    rows: dict[int, list[tuple[int, float]]] = {}
    for prediction, chosen, value in zip(
        image.pairs[near, 0].tolist(), image.pairs[near, 1].tolist(), values[near].tolist(), strict=True
    ):
        rows.setdefault(prediction, []).append((chosen, value))
    return {key: sorted(row, key=lambda item: bool(out[item[0]])) for key, row in rows.items()}


def greedy_match(
    rows: dict[int, list[tuple[int, float]]], threshold: float, out: NDArray[np.bool_], crowd: NDArray[np.bool_]
) -> dict[int, int]:
    """Match greedily by descending score: prediction -> object. Only a crowd region can be matched more than once.

    As in pycocotools, objects that are not ignored come first, and of equal overlaps the later object is matched.

    Args:
        rows: what `candidates` returns.
        threshold: the lowest IoU of a match.
        out: (m,) bool, ignored objects.
        crowd: (m,) bool, crowd regions.
    """
    taken: set[int] = set()
    matched: dict[int, int] = {}
    for prediction, row in rows.items():
        best, choice = min(threshold, 1 - 1e-10), -1
        for number, value in row:
            if number in taken and not crowd[number]:
                continue
            if choice >= 0 and not out[choice] and out[number]:
                break
            if value >= best:
                best, choice = value, number
        if choice >= 0:
            matched[prediction] = choice
            taken.add(choice)
    return matched


def concatenate_matches(parts: Iterable[PredictionMatches], num_classes: int) -> PredictionMatches:
    """The matches of many images as one `PredictionMatches`, in the order of the images."""
    given = list(parts)
    empty = np.zeros((0, len(AREAS), len(THRESHOLDS)), np.bool_)
    return PredictionMatches(
        np.concatenate([np.zeros(0, np.int64), *(one.classes for one in given)]),
        np.concatenate([np.zeros(0), *(one.scores for one in given)]),
        np.concatenate([empty, *(one.hit for one in given)]),
        np.concatenate([empty, *(one.ignored for one in given)]),
        sum((one.truths for one in given), np.zeros((num_classes, len(AREAS)), np.int64)),
    )


def average_precision(scores: NDArray[np.float64], hit: NDArray[np.bool_], truths: int) -> NDArray[np.float64]:
    """Interpolated precision (101, T) at each recall, for n predictions of one class without ignored ones.

    Args:
        scores: (n,).
        hit: (n, T).
        truths: number of objects, at least 1.
    """
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(hit[order], axis=0, dtype=np.float64)
    precision = right / np.arange(1, len(order) + 1)[:, None]
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    table = np.zeros((len(RECALLS), hit.shape[1]))
    for column in range(hit.shape[1]):
        places = np.searchsorted(right[:, column] / truths, RECALLS, side="left")
        reached = places < len(order)
        table[reached, column] = precision[places[reached], column]
    return table


def precisions(matches: PredictionMatches) -> NDArray[np.float64]:
    """(K, 4, T) AP of each class, area range and IoU threshold; -1 where there are no objects."""
    classes = len(matches.truths)
    table = np.full((classes, len(AREAS), len(THRESHOLDS)), -1.0)
    for one in range(classes):
        mine = np.flatnonzero(matches.classes == one)
        for area in np.flatnonzero(matches.truths[one]).tolist():
            table[one, area] = _of_class(matches, mine, area, int(matches.truths[one, area]))
    return table


def _of_class(matches: PredictionMatches, mine: NDArray[np.int64], area: int, truths: int) -> list[float]:
    """AP at each IoU threshold. Computed one by one because the ignored predictions differ between thresholds."""
    values = []
    for number in range(len(THRESHOLDS)):
        counted = mine[~matches.ignored[mine, area, number]]
        curve = average_precision(matches.scores[counted], matches.hit[counted, area, number][:, None], truths)
        values.append(float(curve.mean()))
    return values


def average_precisions(matches: PredictionMatches, names: Sequence[str], prefix: str) -> dict[str, float]:
    """AP, AP50, AP75, AP by size and AP of each class, named as in `CocoMap`, with `prefix` before each name."""
    table = precisions(matches)
    figures = {
        "map": mean_of_present(table[:, 0]),
        "map_50": mean_of_present(table[:, 0, 0]),
        "map_75": mean_of_present(table[:, 0, 5]),
    }
    for index, area in list(enumerate(AREAS))[1:]:
        figures[f"map{area}"] = mean_of_present(table[:, index])
    figures |= {f"map_class/{name}": mean_of_present(table[k, 0]) for k, name in enumerate(names)}
    return {prefix + name: value for name, value in figures.items()}
