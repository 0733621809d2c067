"""Boundaries of masks, and how far two of them agree (Cheng et al., Boundary IoU, CVPR 2021).

A mask's boundary is its pixels within d of the background or the image's edge, d being 2 % of the image's diagonal,
in the chessboard distance, as in the authors' code: there, d erosions by a square of 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import minimum_filter1d

from m2f_trainer.data.rle import Bitmap, Box, box_of, paint, read_runs

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
    x0, y0 = max(first.box[0], second.box[0]), max(first.box[1], second.box[1])
    x1, y1 = min(first.box[2], second.box[2]), min(first.box[3], second.box[3])
    if x1 <= x0 or y1 <= y0:
        return 0.0
    parts = [
        one.pixels[y0 - one.box[1] : y1 - one.box[1], x0 - one.box[0] : x1 - one.box[0]] for one in (first, second)
    ]
    both = int(np.count_nonzero(parts[0] & parts[1]))
    return both / (first.count + second.count - both)
