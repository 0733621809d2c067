"""Each image's predictions beside its objects, with the pairs that overlap: what all diagnoses start from.

Masks are compared as RLE; bitmaps exist for the boundaries of a few masks at a time. Of the pairs, only those whose
overlap could matter are kept, so that a scene is small however many predictions and objects it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy.ndimage import minimum_filter1d

from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.inference.instances import Instances
from m2f_trainer.masks.rle import Bitmap, Box, box_area, box_of, intersection, paint, read_runs

RATIO = 0.02  # of the image's diagonal


@dataclass(frozen=True)
class Boundary:
    """The boundary of one mask: a bitmap (y1 - y0, x1 - x0) of zeros and ones within the mask's box."""

    box: Box
    pixels: Bitmap
    count: int


def thickness(height: int, width: int) -> int:
    """Pixels that a boundary is thick, at least one."""
    return max(1, round(RATIO * math.hypot(height, width)))


def boundary_of(rle: Mapping[str, Any]) -> Boundary:
    """The boundary of a COCO RLE, worked out within the mask's box alone."""
    height, width = rle["size"]
    runs = read_runs(rle["counts"], height, width)
    box = box_of(runs, height)
    mask = np.ascontiguousarray(paint(runs, box, height))
    core, side = mask, 2 * thickness(height, width) + 1
    for axis in (0, 1) if mask.size else ():
        core = minimum_filter1d(core, min(side, 2 * mask.shape[axis] + 1), axis=axis, mode="constant", cval=0)
    edge = mask - core
    return Boundary(box, edge, int(edge.sum()))


def boundary_iou(first: Boundary, second: Boundary) -> float:
    """Pixels of both boundaries over pixels of either; 0 where there are none."""
    x0, y0, x1, y1 = shared = intersection(first.box, second.box)
    if not box_area(shared):
        return 0.0
    parts = [
        one.pixels[y0 - one.box[1] : y1 - one.box[1], x0 - one.box[0] : x1 - one.box[0]] for one in (first, second)
    ]
    both = int(np.count_nonzero(parts[0] & parts[1]))
    return both / (first.count + second.count - both)


LEAST, MATCH = 0.1, 0.5  # overlap below which a pair is nothing, and from which it can be a match


@dataclass(frozen=True, eq=False)
class Scene:
    """One image: n predictions, best first, m objects, and p pairs of both.

    Attributes:
        predicted: (n,) int64 class of each prediction; class k is the k-th of the scorer's categories.
        scores: (n,) float64, falling.
        areas: (n,) float64 pixels.
        truth: (m,) int64 class of each object.
        truth_areas: (m,) float64, the annotation file's own.
        crowd: (m,) bool.
        pairs: (p, 2) int64, prediction and object.
        overlaps: (p,) float64, the IoU of the masks; with a crowd region the share of the prediction that lies in it.
        boundaries: (p,) float64, min(IoU of the boundaries, IoU of the masks); as `overlaps` for crowd regions, for
            pairs of different classes and below `MATCH`, where it isn't asked for.
    """

    image_id: int
    predicted: NDArray[np.int64]
    scores: NDArray[np.float64]
    areas: NDArray[np.float64]
    truth: NDArray[np.int64]
    truth_areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    pairs: NDArray[np.int64]
    overlaps: NDArray[np.float64]
    boundaries: NDArray[np.float64]


def scenes(coco: CocoMap, predictions: Iterable[Instances]) -> Iterator[Scene]:
    """A scene for each image of the scorer's split, in the order of the image ids. Raises DataError as `CocoMap`."""
    found = coco.by_image(predictions)
    classes = {category.id: index for index, category in enumerate(coco.categories)}
    for image_id in coco.sizes:
        yield _scene(image_id, found.get(image_id), coco.objects(image_id), classes)


def _scene(
    image_id: int, found: Instances | None, objects: Sequence[Mapping[str, Any]], classes: Mapping[int, int]
) -> Scene:
    known = [] if found is None else [i for i, one in enumerate(found.category_ids.tolist()) if one in classes]
    scores = np.array([] if found is None else found.scores[known], np.float64)
    order = np.argsort(-scores, kind="stable")
    chosen = [known[index] for index in order]
    masks = [] if found is None else [found.rles[index] for index in chosen]
    predicted = np.array([classes[int(found.category_ids[i])] for i in chosen] if found is not None else [], np.int64)
    truth = np.array([classes[one["category_id"]] for one in objects], np.int64)
    crowd = np.array([bool(one["iscrowd"]) for one in objects], np.bool_)
    regions = [one["segmentation"] for one in objects]
    pairs, overlaps = _overlapping(masks, regions, crowd)
    asked = (overlaps >= MATCH) & ~crowd[pairs[:, 1]] & (predicted[pairs[:, 0]] == truth[pairs[:, 1]])
    boundaries = overlaps.copy()
    boundaries[asked] = np.minimum(overlaps[asked], _boundary_ious(masks, regions, pairs[asked]))
    return Scene(
        image_id,
        predicted,
        scores[order],
        np.array([coco_mask.area(mask) for mask in masks], np.float64),  # of a list it fails from 256 masks on
        truth,
        np.array([one["area"] for one in objects], np.float64),
        crowd,
        pairs,
        overlaps,
        boundaries,
    )


def _overlapping(
    masks: list[dict[str, Any]], regions: list[dict[str, Any]], crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs (p, 2) that overlap by at least `LEAST`, and by how much (p,)."""
    if not masks or not regions:
        return np.zeros((0, 2), np.int64), np.zeros(0)
    unique: dict[bytes, int] = {}  # a query that was taken for several classes has one mask
    position = [unique.setdefault(mask["counts"], len(unique)) for mask in masks]
    firsts = [{"size": masks[0]["size"], "counts": counts} for counts in unique]
    table = np.asarray(coco_mask.iou(firsts, regions, crowd.astype(np.uint8).tolist()))[position]  # (n, m)
    pairs = np.argwhere(table >= LEAST).astype(np.int64)
    return pairs, table[pairs[:, 0], pairs[:, 1]]


def _boundary_ious(
    masks: list[dict[str, Any]], regions: list[dict[str, Any]], pairs: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(p,) IoU of the boundaries of each pair; the boundary of a mask is found once in a row of its pairs."""
    objects: dict[int, Boundary] = {}
    values, before, mine = [], -1, None
    for prediction, region in pairs.tolist():
        if prediction != before:
            before, mine = prediction, boundary_of(masks[prediction])
        if region not in objects:
            objects[region] = boundary_of(regions[region])
        values.append(boundary_iou(mine, objects[region]) if mine else 0.0)
    return np.array(values, np.float64)
