"""Polygons of masks give the masks back."""

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from m2f_trainer.masks.polygons import crosses_itself, mask_to_polygons


def painted(polygons: list[list[float]], height: int, width: int) -> NDArray[np.bool_]:
    painted = np.zeros((height, width), bool)
    for polygon in polygons:
        corners = np.array(polygon).reshape(-1, 2)
        for y in range(height):  # even-odd rule at pixel centres
            for x in range(width):
                a, b = corners, np.roll(corners, -1, 0)
                crossed = (a[:, 1] > y + 0.5) != (b[:, 1] > y + 0.5)
                painted[y, x] |= bool(((a[:, 0] > x + 0.5) & crossed).sum() % 2)
    return painted


@pytest.mark.parametrize("seed", range(5))
def test_outlines_enclose_the_masks_pixels_and_no_others(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 12)) < 0.5
    mask[1:-1, 1:-1] |= ~(mask[:-2, 1:-1] | mask[2:, 1:-1])
    from scipy.ndimage import binary_fill_holes

    filled = binary_fill_holes(mask, np.ones((3, 3)))
    assert np.array_equal(painted(mask_to_polygons(filled), 9, 12), filled)


def test_a_rectangle_has_four_corners_in_the_images_frame_and_a_hole_is_filled() -> None:
    mask = np.ones((3, 4), bool)
    mask[1, 1] = False
    (polygon,) = mask_to_polygons(mask, x0=10, y0=20)
    assert sorted(zip(polygon[::2], polygon[1::2], strict=True)) == [(10, 20), (10, 23), (14, 20), (14, 23)]
    encoded = coco_mask.merge(coco_mask.frPyObjects([polygon], 40, 30))
    assert coco_mask.area(encoded) == 12


def test_pixels_that_touch_at_a_corner_are_two_polygons_and_nothing_is_none() -> None:
    assert len(mask_to_polygons(np.eye(2, dtype=bool))) == 2
    assert mask_to_polygons(np.zeros((3, 3), bool)) == []


@pytest.mark.parametrize(
    ("polygon", "crosses"),
    [
        ([0, 0, 4, 4, 4, 0, 0, 4], True),
        ([0, 0, 4, 0, 4, 4, 0, 4], False),
        ([0, 0, 4, 0, 4, 4, 2, 0, 0, 4], False),  # touches
        ([0, 0, 4, 0, 4, 4], False),
        ([0, 0, 4, 0, 4, 4, 0, 4, 0, 0, 4, 0, 4, 4, 0, 4], False),  # wound twice: an empty mask
    ],
)
def test_only_crossing_edges_count_as_self_intersection(polygon, crosses):
    assert crosses_itself(polygon) is crosses
