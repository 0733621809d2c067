"""Predictions matched with objects as pycocotools matches them, from the overlaps of `scenes`; AP from the matches.

pycocotools' own matching can't be given overlaps of another kind, such as those of boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.evaluation.coco import mean_of_present
from m2f_trainer.evaluation.overlaps import MATCH, Scene

Overlap = Literal["masks", "boundaries"]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"": (0.0, 1e10), "_small": (0.0, 32.0**2), "_medium": (32.0**2, 96.0**2), "_large": (96.0**2, 1e10)}
MOST = 100  # predictions of a class in an image


@dataclass(frozen=True, eq=False)
class Matches:
    """What became of the predictions of one image, or of many behind one another.

    Attributes:
        classes: (n,) int64.
        scores: (n,) float64.
        hit: (n, 4, T) bool: matched with an object, of each area range and at each threshold.
        ignored: (n, 4, T) bool: counts neither as right nor as wrong.
        truths: (K, 4) int64: objects to be found.
    """

    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    hit: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    truths: NDArray[np.int64]


def match_scene(scene: Scene, num_classes: int, overlap: Overlap = "masks") -> Matches:
    """Match at every threshold and area range, at most `MOST` predictions of a class."""
    values = scene.overlaps if overlap == "masks" else scene.boundaries
    kept = _first_of_each_class(scene.predicted)
    shape = (len(scene.predicted), len(AREAS), len(THRESHOLDS))
    hit, ignored = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    truths = np.zeros((num_classes, len(AREAS)), np.int64)
    for index, (low, high) in enumerate(AREAS.values()):
        out = scene.crowd | (scene.truth_areas < low) | (scene.truth_areas > high)
        np.add.at(truths[:, index], scene.truth[~out], 1)
        rows = candidates(scene, values, out)
        ignored[:, index] = ((scene.areas < low) | (scene.areas > high))[:, None]
        for number, threshold in enumerate(THRESHOLDS.tolist()):
            for prediction, chosen in pair_up(rows, threshold, out, scene.crowd).items():
                hit[prediction, index, number] = True
                ignored[prediction, index, number] = out[chosen]
    return Matches(scene.predicted[kept], scene.scores[kept], hit[kept], ignored[kept], truths)


def _first_of_each_class(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the first `MOST` of each class, in order."""
    if len(classes) <= MOST:
        return np.arange(len(classes))
    return np.sort(np.concatenate([np.flatnonzero(classes == one)[:MOST] for one in np.unique(classes)]))


def candidates(scene: Scene, values: NDArray[np.float64], out: NDArray[np.bool_]) -> dict[int, list[tuple[int, float]]]:
    """Prediction -> the objects of its class that it could be matched with and the overlap, those that count first."""
    same = scene.predicted[scene.pairs[:, 0]] == scene.truth[scene.pairs[:, 1]]
    near = np.flatnonzero(same & (values >= MATCH - 1e-9))
    rows: dict[int, list[tuple[int, float]]] = {}
    for prediction, chosen, value in zip(
        scene.pairs[near, 0].tolist(), scene.pairs[near, 1].tolist(), values[near].tolist(), strict=True
    ):
        rows.setdefault(prediction, []).append((chosen, value))
    return {key: sorted(row, key=lambda item: bool(out[item[0]])) for key, row in rows.items()}


def pair_up(
    rows: dict[int, list[tuple[int, float]]], threshold: float, out: NDArray[np.bool_], crowd: NDArray[np.bool_]
) -> dict[int, int]:
    """Prediction -> object, greedily by score, each object once, a crowd region any number of times.

    An object that counts is taken before one that doesn't, and of two with one overlap the later, as in pycocotools.
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


def joined(parts: Iterable[Matches], num_classes: int) -> Matches:
    """Those of many images as one, in the order of the images."""
    given = list(parts)
    empty = np.zeros((0, len(AREAS), len(THRESHOLDS)), np.bool_)
    return Matches(
        np.concatenate([np.zeros(0, np.int64), *(one.classes for one in given)]),
        np.concatenate([np.zeros(0), *(one.scores for one in given)]),
        np.concatenate([empty, *(one.hit for one in given)]),
        np.concatenate([empty, *(one.ignored for one in given)]),
        sum((one.truths for one in given), np.zeros((num_classes, len(AREAS)), np.int64)),
    )


def average_precision(scores: NDArray[np.float64], hit: NDArray[np.bool_], truths: int) -> NDArray[np.float64]:
    """Precision (101, T) at each recall for predictions of one class, ignored ones left out; hit is (n, T)."""
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


def precisions(matches: Matches) -> NDArray[np.float64]:
    """(K, 4, T) AP of each class, area range and threshold; -1 without truth."""
    classes = len(matches.truths)
    table = np.full((classes, len(AREAS), len(THRESHOLDS)), -1.0)
    for one in range(classes):
        mine = np.flatnonzero(matches.classes == one)
        for area in np.flatnonzero(matches.truths[one]).tolist():
            table[one, area] = _of_class(matches, mine, area, int(matches.truths[one, area]))
    return table


def _of_class(matches: Matches, mine: NDArray[np.int64], area: int, truths: int) -> list[float]:
    """AP at each threshold: which predictions are ignored differs from one to the next."""
    values = []
    for number in range(len(THRESHOLDS)):
        counted = mine[~matches.ignored[mine, area, number]]
        curve = average_precision(matches.scores[counted], matches.hit[counted, area, number][:, None], truths)
        values.append(float(curve.mean()))
    return values


def boundary_figures(matches: Matches, names: Sequence[str]) -> dict[str, float]:
    """Boundary AP as COCO's mask AP is told: `boundary_map`, `_50`, `_75`, by size, and `boundary_map_class/<name>`."""
    table = precisions(matches)
    figures = {
        "boundary_map": mean_of_present(table[:, 0]),
        "boundary_map_50": mean_of_present(table[:, 0, 0]),
        "boundary_map_75": mean_of_present(table[:, 0, 5]),
    }
    for index, area in list(enumerate(AREAS))[1:]:
        figures[f"boundary_map{area}"] = mean_of_present(table[:, index])
    return figures | {f"boundary_map_class/{name}": mean_of_present(table[k, 0]) for k, name in enumerate(names)}
