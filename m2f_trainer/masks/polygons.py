"""Masks to polygons along pixel edges, for annotation tools, and the check of polygons that cross themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Point = tuple[int, int]
Step = tuple[int, int]
"""(dx, dy) of one pixel, y down."""

RIGHT_TURN: dict[Step, Step] = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}
_MAX_PAIRS = 5_000_000  # of edges that overlap along an axis, of a polygon that is checked for crossings
_PAIRS_AT_ONCE = 200_000  # which are in memory
_FEW_EDGES = 32  # of which all pairs are compared, because sorting them takes longer


def mask_to_polygons(mask: NDArray[np.bool_], x0: int = 0, y0: int = 0) -> list[list[float]]:
    """The outer boundary of each 4-connected component as [x, y, x, y, ...], only its corners; holes are filled.

    Args:
        mask: (h, w), a crop of the image with its top left corner at (x0, y0).

    >>> mask_to_polygons(np.ones((2, 3), bool), x0=10)
    [[13.0, 0.0, 13.0, 2.0, 10.0, 2.0, 10.0, 0.0]]
    """
    edges = _boundary_steps(mask)
    polygons = []
    while edges:
        loop = _trace_loop(edges)
        if _signed_area(loop) > 0:  # the boundaries of holes run the other way round
            polygons.append([float(value) for x, y in loop for value in (x + x0, y + y0)])
    return polygons


def _boundary_steps(mask: NDArray[np.bool_]) -> dict[Point, list[Step]]:
    """From each pixel corner, the steps along the boundary that have the mask on their right."""
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


def _trace_loop(edges: dict[Point, list[Step]]) -> list[Point]:
    """Follow one closed boundary and remove its edges; where two branch, turn right, around the same pixel."""
    start = point = next(iter(edges))
    first = step = edges[start][0]
    corners: list[Point] = []
    while True:
        ways = edges[point]
        ways.remove(step)
        if not ways:
            del edges[point]
        point = (point[0] + step[0], point[1] + step[1])
        right = RIGHT_TURN[step]
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


def crosses_itself(part: Sequence[float]) -> bool:
    """Whether two edges of a closed polygon x0, y0, x1, y1, ... cross between their ends.

    Of many edges, only those that overlap along x, or along y where these are fewer, are compared. Polygons with more
    than 5,000,000 such pairs, so of more than 3000 points, are not checked and count as not crossing.
    """
    points = np.asarray(part, dtype=np.float64).reshape(-1, 2)
    if len(points) < 4:
        return False
    edges = np.stack([points, np.concatenate([points[1:], points[:1]])], axis=1)  # (n, 2, 2): start and end of each
    if len(edges) <= _FEW_EDGES:
        first, second = _all_pairs(len(edges))
        return _any_cross(edges[first], edges[second])
    edges, following = min(map(_sorted_edges, (edges, edges[..., ::-1])), key=lambda found: int(found[1].sum()))
    ends = np.cumsum(following)  # of the pairs that each edge is the first of
    if ends[-1] > _MAX_PAIRS:
        return False
    for start in range(0, int(ends[-1]), _PAIRS_AT_ONCE):
        pairs = np.arange(start, min(start + _PAIRS_AT_ONCE, int(ends[-1])))
        first = np.searchsorted(ends, pairs, side="right")
        second = first + 1 + pairs - (ends - following)[first]
        if _any_cross(edges[first], edges[second]):
            return True
    return False


@lru_cache
def _all_pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = np.triu_indices(count, 1)
    return first, second


def _sorted_edges(edges: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The edges (n, 2, 2) by their smallest x, and how many of those after each one overlap with it along x, (n,)."""
    edges = edges[np.argsort(edges[..., 0].min(axis=1))]
    low, high = edges[..., 0].min(axis=1), edges[..., 0].max(axis=1)
    return edges, np.searchsorted(low, high, side="right") - np.arange(1, len(edges) + 1)


def _any_cross(edges: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Whether an edge (m, 2, 2) and the other one of its pair cross between their ends."""
    return bool((_divides(edges, others) & _divides(others, edges)).any())


def _divides(lines: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each edge (m, 2, 2) has its ends on the two sides of its line, one of (m, 2, 2); (m,)."""
    along, to_ends = lines[:, 1] - lines[:, 0], edges - lines[:, :1]
    one, other = along[:, :1] * to_ends[..., 1], along[:, 1:] * to_ends[..., 0]  # (m, 2)
    left, right = one > other, one < other
    return (left[:, 0] & right[:, 1]) | (right[:, 0] & left[:, 1])


def simplify(polygon: Sequence[float], tolerance: float) -> list[float]:
    """A closed polygon with fewer corners, none of the old ones farther than `tolerance` from its edges.

    The algorithm of Douglas and Peucker (1973), on the two halves between the first corner and the farthest from it.

    >>> simplify([0, 0, 4, 0.5, 8, 0, 8, 8, 0, 8], tolerance=1)
    [0.0, 0.0, 8.0, 0.0, 8.0, 8.0, 0.0, 8.0]
    """
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    count = len(points)
    if count < 4:
        return [float(value) for value in polygon]
    closed = np.concatenate([points, points[:1]])
    far = int(np.argmax(((points - points[0]) ** 2).sum(1)))
    kept = {0, far}
    spans = [(0, far), (far, count)]
    while spans:
        start, end = spans.pop()
        if end - start < 2:
            continue
        between, origin, along = closed[start + 1 : end], closed[start], closed[end] - closed[start]
        along_share = ((between - origin) @ along / max(float(along @ along), 1e-12)).clip(0, 1)  # of the nearest point
        distances = np.hypot(*(between - origin - along_share[:, None] * along).T)
        farthest = int(np.argmax(distances))
        if distances[farthest] > tolerance:
            middle = start + 1 + farthest
            kept.add(middle)
            spans += [(start, middle), (middle, end)]
    return [float(value) for value in points[sorted(kept)].reshape(-1)]
