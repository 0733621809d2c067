"""Polygons of masks give the masks back."""

import time

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
    assert (
        crosses_itself([value for x, y in zip(polygon[::2], polygon[1::2], strict=True) for value in (y, x)]) is crosses
    )


def crosses_by_integers(points: list[tuple[int, int]]) -> bool:
    """The definition, for each pair of edges, in exact arithmetic."""

    def side(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    edges = list(zip(points, points[1:] + points[:1], strict=True))
    return any(
        side(*one, two[0]) * side(*one, two[1]) < 0 and side(*two, one[0]) * side(*two, one[1]) < 0
        for i, one in enumerate(edges)
        for two in edges[:i]
    )


def test_crossings_are_those_of_every_pair_of_edges_in_exact_arithmetic():
    generator = np.random.default_rng(0)
    found = [0, 0]
    for count in (4, 5, 6, 8, 60):
        for _ in range(40):
            turn = np.sort(generator.random(count)) * 2 * np.pi
            around = np.stack([np.cos(turn), np.sin(turn)], axis=1) * generator.integers(30, 90, (count, 1))
            points = generator.integers(0, 6, (count, 2)) if count < 8 else around.astype(int)
            expected = crosses_by_integers([(int(x), int(y)) for x, y in points])
            assert crosses_itself(points.ravel().tolist()) == expected
            found[expected] += 1
    assert min(found) > 20


@pytest.mark.parametrize("count", [2900, 20_000])
def test_a_smooth_outline_of_many_points_is_compared_in_milliseconds(count):
    """A comparison of all pairs takes over a second for 2900 points."""
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    outline = (300 + 200 * np.stack([np.cos(turn), np.sin(turn)], axis=1)).round(2)
    start = time.process_time()
    assert not crosses_itself(outline.ravel().tolist())
    assert time.process_time() - start < 0.2
    outline[[count // 8, count // 2]] = outline[[count // 2, count // 8]]
    assert crosses_itself(outline.ravel().tolist())
