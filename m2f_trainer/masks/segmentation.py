"""COCO segmentations, validated before any C code reads them, and decoded exactly as pycocotools does.

pycocotools doesn't validate its input: a NaN in a polygon or a giant size ends the process, run lengths that don't add
up to the image's pixels hang it, and truncated ones decode to uninitialised memory. So every mask enters through
`to_counts`, whose result is a valid compressed RLE: safe for pycocotools, and decoded by `decode` without C code.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from m2f_trainer.errors import MaskError
from m2f_trainer.masks.rle import (
    Bitmap,
    brief,
    check_size,
    merge_empty_runs,
    paint,
    read_runs,
    runs_of_list,
    write_counts,
)

_ADD_MASK = "Add the polygon of the object, or leave out its image: an object without a mask is learnt as background."
_MAX_SIDES_OUTSIDE = 10  # a polygon's coordinate may lie this many image sides outside; further out is a mistake
_MAX_BOUNDARY = 4_000_000  # pixels on the boundary of one object; pycocotools takes 40 bytes for each


def to_counts(segmentation: object, height: int, width: int, where: str) -> str:
    """The compressed RLE of one annotation's `segmentation`, equal to pycocotools' own for a valid one.

    Args:
        segmentation: polygons `[[x0, y0, x1, y1, ...], ...]`, or an RLE `{"size": [H, W], "counts": str or list}`
        where: file and annotation in messages

    Raises:
        MaskError: it isn't a valid mask of an image of this size
    """
    check_size(height, width, where)
    if isinstance(segmentation, Mapping):
        return _counts_of_rle(segmentation, height, width, where)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str | bytes):
        return _counts_of_polygons(segmentation, height, width, where)
    raise MaskError(
        f"{where}: expected polygons [[x, y, ...]] or an RLE {{size, counts}} as `segmentation`, got"
        f" {brief(segmentation)}. {_ADD_MASK}"
    )


def encode(bitmap: npt.NDArray[np.uint8] | npt.NDArray[np.bool_]) -> str:
    """The compressed RLE of a bitmap (H, W) of zeros and non-zeros: the inverse of `decode`."""
    encoded = coco_mask.encode(np.asfortranarray(bitmap != 0, dtype=np.uint8))
    return str(encoded["counts"], "ascii")


def decode(counts: str | bytes, height: int, width: int, where: str = "RLE") -> Bitmap:
    """The mask (H, W) of zeros and ones, column-major in memory as pycocotools' masks are.

    Raises:
        MaskError: the counts are damaged, or don't add up to the image's pixels
    """
    return paint(read_runs(counts, height, width, where), (0, 0, width, height), height)


# polygons


def _counts_of_polygons(polygons: Sequence[Any], height: int, width: int, where: str) -> str:
    if not polygons:
        raise MaskError(f"{where}: the segmentation is empty. {_ADD_MASK}")
    reach = _MAX_SIDES_OUTSIDE * max(height, width)
    for i, part in enumerate(polygons):
        if not _is_packed(part, reach):
            _check_polygon(part, height, width, f"{where}, polygon {i}")
    parts: list[Any] = [np.frombuffer(part) if isinstance(part, array) else list(part) for part in polygons]
    if min(height, width) > 2 and _are_fractions(parts):
        raise MaskError(
            f"{where}: expected coordinates in pixels, got coordinates between 0 and 1, which are fractions of the"
            " image's width and height. Multiply x by the width and y by the height."
        )
    upper_bound = 2 * reach * sum(map(len, parts))  # no edge is longer than twice the reach
    if upper_bound > _MAX_BOUNDARY and (length := sum(map(_boundary_length, parts))) > _MAX_BOUNDARY:
        raise MaskError(
            f"{where}: the boundary is {length:,.0f} pixels long, more than {_MAX_BOUNDARY:,}."
            " Correct the polygon, or write the mask as an RLE."
        )
    encoded = coco_mask.frPyObjects(parts, height, width)
    whole = encoded[0] if len(encoded) == 1 else coco_mask.merge(encoded)
    return str(whole["counts"], "ascii")


def _is_packed(part: object, reach: int) -> bool:
    """Whether a polygon is a valid array: a fast check, which most of perhaps a million polygons pass."""
    if type(part) is not array or part.typecode != "d" or len(part) < 6 or len(part) % 2:
        return False
    values = np.frombuffer(part)
    return bool(-reach <= values.min() and values.max() <= reach)  # both are false where there is a NaN


def _check_polygon(part: object, height: int, width: int, where: str) -> None:
    """Raise MaskError where a polygon isn't a list of numbers x0, y0, x1, y1, ... as pycocotools expects it."""
    if not isinstance(part, list | tuple | array):
        raise MaskError(
            f"{where}: expected a list of numbers [x, y, x, y, ...], got {brief(part)}. Correct the polygon."
        )
    if not isinstance(part, array) and not {type(value) for value in part} <= {int, float}:
        wrong = next(value for value in part if type(value) not in (int, float))
        raise MaskError(
            f"{where}: expected numbers x, y, x, y, ..., got {brief(wrong)} among them. Correct the polygon."
        )
    if len(part) < 6 or len(part) % 2:
        raise MaskError(
            f"{where}: expected at least three points as x, y, x, y, ..., got {len(part)} numbers."
            " Correct the polygon, or remove this part."
        )
    reach = _MAX_SIDES_OUTSIDE * max(height, width)
    low, high = min(part), max(part)
    # min() and max() miss a NaN in the middle, the sum doesn't; inf is out of reach
    if not -reach <= low <= high <= reach or math.isnan(sum(part)):
        raise MaskError(
            f"{where}: expected finite coordinates within {_MAX_SIDES_OUTSIDE} sides of the {width}x{height} image,"
            f" got {brief(next(value for value in part if not -reach <= value <= reach))}. Correct the polygon."
        )


def _are_fractions(parts: Sequence[Sequence[float]]) -> bool:
    if any(part[0] > 1 or max(part) > 1 or min(part) < 0 for part in parts):
        return False
    return any(value % 1 for part in parts for value in part)


def _boundary_length(part: Sequence[float]) -> float:
    """The pixels that pycocotools draws for a closed polygon: for each edge, those along its longer axis."""
    points = np.asarray(part, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() + len(points))


# run lengths


def _counts_of_rle(rle: Mapping[object, object], height: int, width: int, where: str) -> str:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width] and size != (height, width):
        raise MaskError(
            f"{where}: expected an RLE of size [height, width] = [{height}, {width}] as its image, got {brief(size)}."
            " Correct the image's `height` and `width`, or the RLE."
        )
    if isinstance(counts, str | bytes):
        return write_counts(merge_empty_runs(read_runs(counts, height, width, where)), height, width)
    if isinstance(counts, list | tuple):
        return write_counts(merge_empty_runs(runs_of_list(counts, height, width, where)), height, width)
    raise MaskError(
        f"{where}: expected RLE counts as a string or a list of numbers, got {brief(counts)}. Correct the RLE."
    )
