"""Masks to polygons along the pixels' edges, for annotation tools."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

Point = tuple[int, int]
Step = tuple[int, int]

RIGHT_OF: dict[Step, Step] = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}
"""(dx, dy), y down: east turns right to south, south to west, ..."""


def outlines(mask: NDArray[np.bool_], x0: int = 0, y0: int = 0) -> list[list[float]]:
    """The outer outline of each 4-connected part as [x, y, x, y, ...], corners alone; holes are filled.

    Args:
        mask: (h, w), which lies at (x0, y0) of the image.

    >>> outlines(np.ones((2, 3), bool), x0=10)
    [[13.0, 0.0, 13.0, 2.0, 10.0, 2.0, 10.0, 0.0]]
    """
    edges = _edges(mask)
    polygons = []
    while edges:
        loop = _loop(edges)
        if _signed_area(loop) > 0:  # holes run the other way round
            polygons.append([float(value) for x, y in loop for value in (x + x0, y + y0)])
    return polygons


def _edges(mask: NDArray[np.bool_]) -> dict[Point, list[Step]]:
    """From each corner, the unit steps along the border that have the mask on their right."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    sides = {
        (1, 0): (inside & ~padded[:-2, 1:-1], 0, 0),
        (0, 1): (inside & ~padded[1:-1, 2:], 1, 0),
        (-1, 0): (inside & ~padded[2:, 1:-1], 1, 1),
        (0, -1): (inside & ~padded[1:-1, :-2], 0, 1),
    }
    edges: dict[Point, list[Step]] = {}
    for step, (border, right, down) in sides.items():
        for y, x in np.argwhere(border).tolist():
            edges.setdefault((x + right, y + down), []).append(step)
    return edges


def _loop(edges: dict[Point, list[Step]]) -> list[Point]:
    """Walk one closed line, taking its edges out; where two ways part, keep to the right, around the same pixel."""
    start = point = next(iter(edges))
    first = step = edges[start][0]
    corners: list[Point] = []
    while True:
        ways = edges[point]
        ways.remove(step)
        if not ways:
            del edges[point]
        point = (point[0] + step[0], point[1] + step[1])
        right = RIGHT_OF[step]
        closing = [first] if point == start else []
        ways = [*edges.get(point, []), *closing]
        following = right if right in ways else step if step in ways else ways[0]
        if following != step:
            corners.append(point)
        if point == start and following == first:
            return corners
        step = following


def _signed_area(loop: list[Point]) -> int:
    """Twice the area, positive clockwise with y down."""
    following = loop[1:] + loop[:1]
    return sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(loop, following, strict=True))


_LONGEST = 3000  # points of a polygon that is still searched for crossings, edge by edge


def crosses_itself(part: Sequence[float]) -> bool:
    """Whether two edges of a closed polygon x0, y0, x1, y1, ... cross in their inside."""
    points = np.asarray(part, dtype=np.float64).reshape(-1, 2)
    if not 4 <= len(points) <= _LONGEST:
        return False
    ends = np.roll(points, -1, axis=0)
    side = _side(points[:, None], ends[:, None], points[None])  # (n, n): where point j lies of edge i
    apart = side * np.roll(side, -1, axis=1) < 0  # edge j has its ends on both sides of the line through edge i
    return bool((apart & apart.T).any())


def _side(
    start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], point: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    edge, way = end - start, point - start
    return np.asarray(np.sign(edge[..., 0] * way[..., 1] - edge[..., 1] * way[..., 0]))
