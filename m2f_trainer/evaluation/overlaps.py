"""The overlaps between predictions and objects of each image: the input of all matching and diagnostics.

Masks are compared as RLE. Bitmaps exist only for the boundaries of a few masks at a time. Only pairs with an IoU of at
least `BACKGROUND_IOU` are kept, so memory stays small even for many predictions and objects.
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
from m2f_trainer.masks.rle import Bitmap, Box, areas, box_area, box_of, intersection, paint, read_runs

DILATION_RATIO = 0.02  # thickness of a boundary as a share of the image's diagonal


@dataclass(frozen=True)
class Boundary:
    """The boundary of one mask.

    Attributes:
        box: the mask's bounding box in the image.
        pixels: (y1 - y0, x1 - x0) of zeros and ones, cropped to `box`.
        count: number of boundary pixels.
    """

    box: Box
    pixels: Bitmap
    count: int


def thickness(height: int, width: int) -> int:
    """Thickness of a boundary in pixels, at least one, as in Boundary IoU (Cheng et al., CVPR 2021)."""
    return max(1, round(DILATION_RATIO * math.hypot(height, width)))


def boundary_of(rle: Mapping[str, Any]) -> Boundary:
    """The boundary of a COCO RLE: the mask minus its erosion, computed inside the mask's box only."""
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
    """Intersection over union of two boundaries; 0 if both are empty or their boxes do not overlap."""
    x0, y0, x1, y1 = shared = intersection(first.box, second.box)
    if not box_area(shared):
        return 0.0
    parts = [
        one.pixels[y0 - one.box[1] : y1 - one.box[1], x0 - one.box[0] : x1 - one.box[0]] for one in (first, second)
    ]
    both = int(np.count_nonzero(parts[0] & parts[1]))
    return both / (first.count + second.count - both)


BACKGROUND_IOU = 0.1  # pairs below it are dropped
PREDICTIONS_AT_ONCE = 1000  # whose overlaps with all objects of an image are in memory
MATCH_IOU = 0.5  # the lowest IoU of a match


@dataclass(frozen=True, eq=False)
class ImageOverlaps:
    """One image: n predictions sorted by descending score, m objects, and the p pairs of them that overlap.

    Attributes:
        predicted: (n,) int64 class of each prediction; class k is the k-th of the scorer's categories.
        scores: (n,) float64, descending.
        areas: (n,) float64, in pixels.
        truth: (m,) int64 class of each object.
        truth_areas: (m,) float64, in pixels, as given in the annotation file.
        crowd: (m,) bool, True for crowd regions.
        pairs: (p, 2) int64, index of the prediction and of the object.
        overlaps: (p,) float64, mask IoU; for a crowd region the share of the prediction inside it, as in pycocotools.
        boundaries: (p,) float64, min(boundary IoU, mask IoU). Equal to `overlaps` where it is not needed: for crowd
            regions, for pairs of different classes and for overlaps below `MATCH_IOU`.
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


def image_overlaps(coco: CocoMap, predictions: Iterable[Instances]) -> Iterator[ImageOverlaps]:
    """Yield the overlaps of each image of the split, sorted by image id. Raises DataError as `CocoMap` does."""
    found = coco.by_image(predictions)
    classes = {category.id: index for index, category in enumerate(coco.categories)}
    for image_id in coco.sizes:
        yield _overlaps_of_image(image_id, found.get(image_id), coco.objects(image_id), classes)


def _overlaps_of_image(
    image_id: int, found: Instances | None, objects: Sequence[Mapping[str, Any]], classes: Mapping[int, int]
) -> ImageOverlaps:
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
    needed = (overlaps >= MATCH_IOU) & ~crowd[pairs[:, 1]] & (predicted[pairs[:, 0]] == truth[pairs[:, 1]])
    boundaries = overlaps.copy()
    boundaries[needed] = np.minimum(overlaps[needed], _boundary_ious(masks, regions, pairs[needed]))
    return ImageOverlaps(
        image_id,
        predicted,
        scores[order],
        np.array(areas(masks), np.float64),
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
    """The pairs (p, 2) that overlap by at least `BACKGROUND_IOU`, and their overlaps (p,)."""
    starts = range(0, len(masks) if regions else 0, PREDICTIONS_AT_ONCE)
    parts = [_overlaps_of(masks[start : start + PREDICTIONS_AT_ONCE], regions, crowd) for start in starts]
    pairs = [found + np.array([start, 0]) for start, (found, _) in zip(starts, parts, strict=True)]
    return (
        np.concatenate([np.zeros((0, 2), np.int64), *pairs]),
        np.concatenate([np.zeros(0), *(values for _, values in parts)]),
    )


def _overlaps_of(
    masks: list[dict[str, Any]], regions: list[dict[str, Any]], crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """As `_overlapping`, with memory for every pair of a prediction and an object."""
    unique: dict[bytes, int] = {}  # predictions of one query with several classes share a mask
    position = [unique.setdefault(mask["counts"], len(unique)) for mask in masks]
    firsts = [{"size": masks[0]["size"], "counts": counts} for counts in unique]
    table = np.asarray(coco_mask.iou(firsts, regions, crowd.astype(np.uint8).tolist()))[position]  # (n, m)
    pairs = np.argwhere(table >= BACKGROUND_IOU).astype(np.int64)
    return pairs, table[pairs[:, 0], pairs[:, 1]]


def _boundary_ious(
    masks: list[dict[str, Any]], regions: list[dict[str, Any]], pairs: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(p,) boundary IoU of each pair. Pairs are sorted by prediction, so each boundary is computed only once."""
    objects: dict[int, Boundary] = {}
    values, before, mine = [], -1, None
    for prediction, region in pairs.tolist():
        if prediction != before:
            before, mine = prediction, boundary_of(masks[prediction])
        if region not in objects:
            objects[region] = boundary_of(regions[region])
        values.append(boundary_iou(mine, objects[region]) if mine else 0.0)
    return np.array(values, np.float64)
