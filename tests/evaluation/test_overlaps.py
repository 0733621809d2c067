"""Boundaries and boundary AP equal those of scipy and faster-coco-eval."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_erosion

from m2f_trainer.evaluation.overlaps import boundary_iou, boundary_of, thickness


@pytest.mark.parametrize("seed", range(8))
def test_a_boundary_is_the_mask_minus_its_repeated_erosion(seed: int) -> None:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(3, 150, 2).tolist()
    ys, xs = np.mgrid[0:height, 0:width]
    mask = (np.hypot(ys - generator.integers(height), xs - generator.integers(width)) < generator.integers(1, 80)) | (
        generator.random((height, width)) < 0.02
    )
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    boundary = boundary_of(rle)
    core = binary_erosion(mask, np.ones((3, 3)), iterations=max(1, round(0.02 * np.hypot(height, width))))
    whole = np.zeros((height, width), np.uint8)
    x0, y0, x1, y1 = boundary.box
    whole[y0:y1, x0:x1] = boundary.pixels
    assert np.array_equal(whole, mask & ~core)
    assert boundary.count == (mask & ~core).sum()


def test_disjoint_and_empty_boundaries_have_no_overlap() -> None:
    full, empty = np.ones((20, 20), np.uint8, order="F"), np.zeros((20, 20), np.uint8, order="F")
    corner = empty.copy(order="F")
    corner[8:12, 8:12] = 1
    whole, nothing, inside = (boundary_of(coco_mask.encode(mask)) for mask in (full, empty, corner))
    assert thickness(20, 20) == 1
    assert boundary_iou(whole, whole) == 1
    assert boundary_iou(whole, nothing) == 0 == boundary_iou(nothing, nothing)
    assert boundary_iou(whole, inside) == 0, "the boundary of one lies inside the other without touching its boundary"
