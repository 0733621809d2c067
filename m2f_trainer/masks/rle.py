"""Run lengths: COCO's RLE read and written without trusting it.

A mask's *runs* are int64 (R,): lengths of alternating runs of zeros and ones in column-major order, zeros first.
`Box` and `Size` are the types of boxes and sizes in the whole package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from m2f_trainer.errors import MaskError

Runs: TypeAlias = npt.NDArray[np.int64]
Bitmap: TypeAlias = npt.NDArray[np.uint8]
Box: TypeAlias = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in pixels, x1 and y1 excluded."""

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

MAX_PIXELS = 89_478_485  # Pillow's own limit for one image; 2 ** 32 is where pycocotools' counters overflow
_CHARACTERS_OF_A_COUNT = 7  # 7 x 5 bits hold every count of an image of MAX_PIXELS


def read_runs(counts: str | bytes, height: int, width: int, where: str = "RLE") -> Runs:
    """The runs of a compressed RLE.

    COCO's string is a LEB128 variant: 5 bits a character, sign in the last one's fifth bit, and from the fourth run on
    the difference to the run two before (pycocotools' rleFrString).

    Raises:
        MaskError: the string is damaged, or its runs don't fill the image
    """
    check_size(height, width, where)
    runs = _undo_differences(_read_numbers(_bytes_of(counts, where), where))
    return _check_runs(runs, height, width, where)


def read_own(counts: str | bytes) -> Runs:
    """The runs of a compressed RLE that this package wrote itself, of an image of any size.

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
    """The part of the mask inside a box of the image, (y1 - y0, x1 - x0): only the box's columns are written."""
    x0, y0, x1, y1 = box
    ends = np.cumsum(runs).clip(x0 * height, x1 * height)
    lengths = _steps(ends, x0 * height)
    values = (np.arange(len(runs)) & 1).astype(np.uint8)
    columns = np.repeat(values, lengths).reshape(x1 - x0, height)
    return columns[:, y0:y1].T


def _intervals(runs: Runs) -> tuple[Runs, Runs]:
    """First position and position after the last of each run of ones, (S,) and (S,), column-major."""
    ends = np.cumsum(runs)
    starts, ends = ends[:-1:2], ends[1::2]
    filled = ends > starts
    return starts[filled], ends[filled]


def check_size(height: int, width: int, where: str) -> None:
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise MaskError(
            f"{where}: expected an image of 1 to {MAX_PIXELS:,} pixels, got {width}x{height} (width x height)."
            " Correct the image's `width` and `height`, or cut the image into tiles."
        )


def runs_of_list(counts: Sequence[object], height: int, width: int, where: str) -> Runs:
    odd = [count for count in counts if type(count) is not int or not 0 <= count <= MAX_PIXELS]
    if odd:
        raise MaskError(f"{where}: expected RLE counts of whole numbers from 0, got {brief(odd[0])}. Correct the RLE.")
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
    """The same mask without empty runs after the first: pycocotools' merge ends early at one."""
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
    """The signed numbers of LEB128 digits of 6 bits: 5 of value, the top one says that more follow."""
    last = np.flatnonzero((digits & 32) == 0)
    lengths = _steps(last, -1) if len(last) else last
    if not len(last) or last[-1] != len(digits) - 1 or int(lengths.max()) > _CHARACTERS_OF_A_COUNT:
        raise MaskError(f"{where}: the compressed RLE is truncated or damaged. Export it again.")
    starts = last - lengths + 1
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((digits & 31) << (5 * places), starts)
    negative = (digits[last] & 16) != 0
    return np.asarray(numbers - (negative.astype(np.int64) << (5 * lengths)), dtype=np.int64)


def _steps(values: Runs, before: int) -> Runs:
    """From each value to the next, the first from `before`: np.diff in a third of its time for the few of a mask."""
    steps = values.copy()
    steps[1:] -= values[:-1]
    steps[0] -= before
    return steps


def _undo_differences(numbers: Runs) -> Runs:
    """From the fourth on, a number is the difference to the run two before it."""
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return runs


def brief(value: object) -> str:
    """A value as an error message quotes it: short, whatever it holds."""
    few = isinstance(value, list | tuple) and len(value) <= 4 and all(isinstance(part, int | float) for part in value)
    if isinstance(value, list | tuple | dict) and not few:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:60]) if isinstance(value, str | bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _run_lengths(positions: NDArray[np.int64], frame: int) -> NDArray[np.int64]:
    """Run lengths, background first, from the positions of change; COCO writes no empty run but the first."""
    meeting = np.flatnonzero(positions[1:] == positions[:-1])  # a run ends where another begins
    kept = np.delete(positions, np.concatenate([meeting, meeting + 1])) if len(meeting) else positions
    runs = np.diff(kept, prepend=0, append=frame)
    return runs[:-1] if len(runs) > 1 and runs[-1] == 0 else runs


def encode_runs(runs: Sequence[NDArray[np.int64]]) -> list[bytes]:
    """COCO's compressed form of the run lengths of n masks, byte for byte pycocotools'.

    From the fourth on, a run is written as its difference to the last but one; a number is written in groups of five
    bits, low first, the sixth bit saying that more follow, as the character 48 + value.
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
