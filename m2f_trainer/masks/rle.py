"""COCO's run-length encoding (RLE) of masks: read without trusting it, write, measure and paint.

A mask's *runs* are int64 (R,): the lengths of alternating runs of zeros and ones in column-major order, zeros first.
`Box` and `Size` are the types of boxes and sizes in the whole package.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from m2f_trainer.errors import MaskError, RecipeError

Runs: TypeAlias = npt.NDArray[np.int64]
Bitmap: TypeAlias = npt.NDArray[np.uint8]
Box: TypeAlias = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in pixels, x1 and y1 excluded."""

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

MAX_PIXELS = 89_478_485
"""Default limit of the pixels of an image, the same as Pillow's: a larger one may be a decompression bomb."""

HIGHEST_LIMIT = 2**31 - 1
"""The highest value that the limit can be raised to: counters of pycocotools overflow at 2 ** 32."""

_AREAS_AT_ONCE = 255  # pycocotools' area fails for more masks
_LIMIT = "M2F_MAX_PIXELS"  # an environment variable, so that data workers have the same limit
_MAX_CHARACTERS = 7  # of one count: 7 x 5 bits hold every count of an image of HIGHEST_LIMIT


def max_pixels() -> int:
    """The limit of the pixels of an image in this process."""
    return int(os.environ.get(_LIMIT, MAX_PIXELS))


def allow_pixels(count: int | None) -> None:
    """Change the limit in this process and those that it starts; None leaves it as it is.

    Raises:
        RecipeError: it isn't a number from 1 to `HIGHEST_LIMIT`
    """
    if count is None:
        return
    if not 1 <= count <= HIGHEST_LIMIT:
        raise RecipeError(f"max_pixels: expected between 1 and {HIGHEST_LIMIT}, got {count}.")
    os.environ[_LIMIT] = str(count)


def read_runs(counts: str | bytes, height: int, width: int, where: str = "RLE") -> Runs:
    """The runs of a compressed RLE.

    COCO's string is a variant of LEB128: 5 bits per character, the sign in the fifth bit of the last one, and from the
    fourth run on the difference to the run two before (pycocotools' rleFrString).

    Raises:
        MaskError: the string is damaged, or its runs don't add up to the image's pixels
    """
    check_size(height, width, where)
    runs = _undo_differences(_read_numbers(_bytes_of(counts, where), where))
    return _check_runs(runs, height, width, where)


def read_runs_of_any_size(counts: str | bytes) -> Runs:
    """The runs of a compressed RLE that this package wrote itself, for an image of any size.

    Raises:
        MaskError: the string is damaged
    """
    return _undo_differences(_read_numbers(_bytes_of(counts, "RLE"), "RLE"))


def write_counts(runs: Runs, height: int, width: int) -> str:
    """The compressed RLE of valid runs: the inverse of `read_runs`."""
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return str(encoded["counts"], "ascii")


def area(runs: Runs) -> int:
    """The number of ones."""
    return int(runs[1::2].sum())


def areas(masks: Sequence[Mapping[str, object]]) -> list[int]:
    """The number of ones of each compressed RLE {"size": [H, W], "counts": str}, which are valid."""
    parts = (masks[start : start + _AREAS_AT_ONCE] for start in range(0, len(masks), _AREAS_AT_ONCE))
    return [area for part in parts for area in coco_mask.area(part).tolist()]


def box_of(runs: Runs, height: int) -> Box:
    """The smallest box around the ones; (0, 0, 0, 0) where there are none."""
    starts, ends = _intervals(runs)
    if not len(starts):
        return 0, 0, 0, 0
    first, last = starts // height, (ends - 1) // height
    if (first != last).any():  # a run that goes on in the next column covers the bottom row and the top one
        top, bottom = 0, height
    else:
        top, bottom = int((starts % height).min()), int(((ends - 1) % height).max()) + 1
    return int(first.min()), top, int(last.max()) + 1, bottom


def intersection(first: Box, second: Box) -> Box:
    """The box that two boxes share; where they share nothing, x0 = x1 or y0 = y1.

    >>> intersection((0, 0, 4, 4), (2, 3, 9, 9)), intersection((0, 0, 2, 2), (5, 0, 9, 9))
    ((2, 3, 4, 4), (5, 0, 5, 2))
    """
    x0, y0 = max(first[0], second[0]), max(first[1], second[1])
    return x0, y0, max(x0, min(first[2], second[2])), max(y0, min(first[3], second[3]))


def union(boxes: Iterable[Box]) -> Box:
    """The smallest box around at least one box."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def box_area(box: Box) -> int:
    """The number of pixels in a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def paint(runs: Runs, box: Box, height: int) -> Bitmap:
    """The part of the mask inside a box of the image, (y1 - y0, x1 - x0); only the columns of the box are decoded."""
    x0, y0, x1, y1 = box
    ends = np.cumsum(runs).clip(x0 * height, x1 * height)
    lengths = _steps(ends, x0 * height)
    values = (np.arange(len(runs)) & 1).astype(np.uint8)
    columns = np.repeat(values, lengths).reshape(x1 - x0, height)
    return columns[:, y0:y1].T


def _intervals(runs: Runs) -> tuple[Runs, Runs]:
    """The first index of each run of ones, and the index after its last, (S,) and (S,), column-major."""
    ends = np.cumsum(runs)
    starts, ends = ends[:-1:2], ends[1::2]
    filled = ends > starts
    return starts[filled], ends[filled]


def check_size(height: int, width: int, where: str) -> None:
    """Raise MaskError for an image without pixels or with more than `max_pixels`; `where` names it in the message."""
    if height < 1 or width < 1 or height * width > max_pixels():
        raise MaskError(
            f"{where}: expected an image of 1 to {max_pixels():,} pixels, got {width}x{height} (width x height)."
            " Correct the image's `width` and `height`, cut the image into tiles, or raise the limit with --max_pixels."
        )


def runs_of_list(counts: Sequence[object], height: int, width: int, where: str) -> Runs:
    """The runs of an uncompressed RLE.

    Raises:
        MaskError: a count is no whole number from 0, or they don't add up to the image's pixels
    """
    wrong = [count for count in counts if type(count) is not int or not 0 <= count <= HIGHEST_LIMIT]
    if wrong:
        raise MaskError(
            f"{where}: expected RLE counts of whole numbers from 0, got {brief(wrong[0])}. Correct the RLE."
        )
    return _check_runs(np.array(counts, dtype=np.int64), height, width, where)


def _check_runs(runs: Runs, height: int, width: int, where: str) -> Runs:
    total = int(runs.sum())
    if len(runs) and int(runs.min()) < 0:
        raise MaskError(f"{where}: an RLE count is negative ({int(runs.min())}): the RLE is damaged. Export it again.")
    if total != height * width:
        raise MaskError(
            f"{where}: expected RLE counts that add up to {height} x {width} = {height * width} pixels, got {total}:"
            " the RLE is truncated or belongs to an image of another size. Export it again."
        )
    return runs


def merge_empty_runs(runs: Runs) -> Runs:
    """The same mask without empty runs after the first, at which pycocotools' merge stops early."""
    if runs[1:].all():
        return runs
    starts, ends = _intervals(runs)
    apart = np.append(True, starts[1:] > ends[:-1]) if len(starts) else np.zeros(0, dtype=bool)
    starts, ends = starts[apart], ends[np.append(apart[1:], True)] if len(starts) else ends
    edges = np.stack([starts, ends], axis=1).reshape(-1)  # (2S,)
    total = int(runs.sum())
    if not len(edges) or edges[-1] < total:
        edges = np.append(edges, total)
    return np.diff(edges, prepend=0)


def _bytes_of(counts: str | bytes, where: str) -> npt.NDArray[np.int64]:
    try:
        raw = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        raw = b"\xff"
    digits = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    if not len(digits) or int(digits.min()) < 0 or int(digits.max()) > 63:
        raise MaskError(
            f"{where}: expected a compressed RLE (characters '0' to 'o'), got {brief(counts)}. Export it again."
        )
    return digits


def _read_numbers(digits: npt.NDArray[np.int64], where: str) -> Runs:
    """The signed numbers of LEB128 digits of 6 bits: 5 bits of value, and the top bit where more digits follow."""
    last = np.flatnonzero((digits & 32) == 0)
    lengths = _steps(last, -1) if len(last) else last
    if not len(last) or last[-1] != len(digits) - 1 or int(lengths.max()) > _MAX_CHARACTERS:
        raise MaskError(f"{where}: the compressed RLE is truncated or damaged. Export it again.")
    starts = last - lengths + 1
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((digits & 31) << (5 * places), starts)
    negative = (digits[last] & 16) != 0
    return np.asarray(numbers - (negative.astype(np.int64) << (5 * lengths)), dtype=np.int64)


def _steps(values: Runs, before: int) -> Runs:
    """The differences of successive values, the first from `before`; for short arrays faster than np.diff."""
    steps = values.copy()
    steps[1:] -= values[:-1]
    steps[0] -= before
    return steps


def _undo_differences(numbers: Runs) -> Runs:
    """The runs, of which the fourth and all later ones are given as differences to the run two before."""
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return runs


def brief(value: object) -> str:
    """A value as error messages quote it: at most 60 characters."""
    few = isinstance(value, list | tuple) and len(value) <= 4 and all(isinstance(part, int | float) for part in value)
    if isinstance(value, list | tuple | dict) and not few:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:60]) if isinstance(value, str | bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def runs_of_changes(positions: NDArray[np.int64], pixels: int) -> NDArray[np.int64]:
    """The runs of a mask of `pixels` pixels from the sorted indices, column-major, at which its value changes.

    An index that occurs twice, where one run ends and the next begins, is not a change. No run but the first is empty.
    """
    repeated = np.flatnonzero(positions[1:] == positions[:-1])
    kept = np.delete(positions, np.concatenate([repeated, repeated + 1])) if len(repeated) else positions
    runs = np.diff(kept, prepend=0, append=pixels)
    return runs[:-1] if len(runs) > 1 and runs[-1] == 0 else runs


def encode_runs(runs: Sequence[NDArray[np.int64]]) -> list[bytes]:
    """The compressed RLEs of the runs of n masks, the same bytes as pycocotools writes.

    From the fourth on, a run is written as the difference to the run two before. A number is written in groups of five
    bits, the lowest first, with a sixth bit where more groups follow, as the character 48 + value.
    """
    if not runs:
        return []
    deltas = np.concatenate([np.concatenate([run[:3], run[3:] - run[1:-2]]) for run in runs])
    characters = np.zeros((len(deltas), 13), np.uint8)
    used = np.zeros(len(deltas), np.int64)
    live = np.arange(len(deltas))
    while len(live):
        rest = deltas[live] >> 5
        low = deltas[live] & 31
        more = np.where(low & 16, rest != -1, rest != 0)
        characters[live, used[live]] = low + 48 + 32 * more
        used[live] += 1
        deltas[live] = rest
        live = live[more]
    text = characters[np.arange(13) < used[:, None]].tobytes()
    ends = np.cumsum(used)[np.cumsum([len(run) for run in runs]) - 1]
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
