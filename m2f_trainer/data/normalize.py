"""Convert ids, numbers and segmentations to the form of the COCO format, where their meaning is unambiguous.

An ambiguous value gives None, and the caller reports it.
"""

import ast
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from m2f_trainer.errors import MaskError
from m2f_trainer.masks import rle
from m2f_trainer.masks import segmentation as masks

LARGEST_ID = 2**63 - 1
_Key: TypeAlias = int | str
_DECIMAL = re.compile(r"-?\d+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_LARGEST_NUMBER = 1e15
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, left where a tool cut a name: it can't be written again
_BYTES = re.compile(r"""b(['"]).*\1""", re.DOTALL)
_BOX_TOLERANCE = 1.5  # pixels between the sides of a box and those of its mask


def is_text(value: object) -> bool:
    """Whether this is text that can be encoded as UTF-8."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def type_name(value: object) -> str:
    """The type of a JSON value, for messages."""
    return "null" if value is None else type(value).__name__


def whole_number(value: object) -> int | None:
    """An integer, also one written as 20.0 or "20"; None for anything else."""
    if type(value) is int:
        return value
    if type(value) is float and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) < 20 and re.fullmatch(r"\d+(\.0*)?", value.strip(), re.ASCII):
        return int(value.strip().partition(".")[0])
    return None


def number(value: object) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    return float(value) if type(value) in (int, float) and abs(value) < _LARGEST_NUMBER else None  # type: ignore[arg-type]


def usual_box(value: object) -> list[float] | None:
    """The x, y, width and height of a `bbox`, also written as text; None for anything else."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    sides = [side for one in value if (side := number(one)) is not None]
    return sides if len(sides) == 4 and min(sides[2:]) >= 0 else None


class Ids:
    """Integers of 64 bits for the ids of one list of entries, whatever their type.

    An id that is such an integer keeps its value. "7" gets 7 where no other entry has it; other text, and integers
    beyond 64 bits, are numbered. `numbers` has all of them; `is_plain` says that none was changed.
    """

    def __init__(self, ids: Iterable[object]) -> None:
        keys = dict.fromkeys(key for key in map(_id_key, ids) if key is not None)
        self._numbers: dict[_Key, int] = {key: key for key in keys if _is_id(key)}  # type: ignore[misc]
        others = [key for key in keys if not _is_id(key)]
        values = Counter(_value(key) for key in keys)
        self._by_value = {_value(key): key for key in keys if values[_value(key)] == 1}
        taken = set(self._numbers.values())
        unused = max(taken, default=0) + 1 if max(taken, default=0) < LARGEST_ID // 2 else 1
        for key in others:
            number = _value(key)
            if not isinstance(number, int) or number in taken or not _is_id(number) or number not in self._by_value:
                while unused in taken or unused in values:
                    unused += 1
                number = unused
            taken.add(number)
            self._numbers[key] = number
        self.numbers = frozenset(taken)
        self.is_plain = not others

    def number_of(self, value: object) -> int | None:
        """The integer of an id or of a reference to it; a reference may be 1 where the id is "1" or "001", if only one
        entry has such an id. None where no entry has it.
        """
        key = _id_key(value)
        if key is None:
            return None
        if key not in self._numbers:
            key = self._by_value.get(_value(key))
        return None if key is None else self._numbers[key]


def is_id(value: object) -> bool:
    """Whether a value identifies something: an integer, 1.0, or text."""
    return _id_key(value) is not None


def _id_key(value: object) -> _Key | None:
    """Integers and text by which ids are equal: 1 and 1.0 are, 1 and "1" are not."""
    if type(value) is int:
        return value
    if type(value) is float and math.isfinite(value) and value.is_integer():
        return int(value)
    return value.strip() or None if isinstance(value, str) else None


def _is_id(key: object) -> bool:
    """Whether this is an integer of 64 bits."""
    return type(key) is int and abs(key) <= LARGEST_ID


def _value(key: _Key) -> _Key:
    """The number that a text spells, else the text."""
    return int(key) if isinstance(key, str) and len(key) < 20 and _DECIMAL.fullmatch(key) else key


# segmentations


def usual_segmentation(segmentation: object, height: int, width: int, box: object) -> tuple[Any, str] | None:
    """A segmentation in the form that pycocotools accepts, and the kind of note to report; None if it is ambiguous.

    Args:
        height, width: of the image in pixels
        box: the annotation's `bbox` (x, y, width, height), which decides how an RLE with swapped sides or without a
            size is read
    """
    if isinstance(segmentation, str):  # JSON in text, as tables store it
        try:
            segmentation = json.loads(segmentation)
        except (ValueError, RecursionError):
            return None
    if isinstance(segmentation, Mapping):
        usual = _usual_rle(segmentation, height, width, box)
        return None if usual is None else (usual, "unusual-rle")
    parts = flat_polygons(segmentation)
    kept = [part for part in parts or [] if not _has_no_pixel(part)]
    if not parts or not kept:
        return None
    return kept, "stray-part" if len(kept) < len(parts) else "unusual-outline"


def has_no_outline(segmentation: object) -> bool:
    """Whether a segmentation is missing, [] or [[]]."""
    if isinstance(segmentation, list):
        return all(isinstance(part, Sequence) and not part for part in segmentation)
    return not segmentation


def flat_polygons(segmentation: object) -> list[Sequence[float]] | None:
    """The polygons of a segmentation in any spelling, each as [x, y, x, y, ...]; None if it isn't one of polygons."""
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str | bytes):
        return None
    if all(map(_is_number, segmentation)) or all(_point(part) is not None for part in segmentation):
        segmentation = [segmentation]
    parts = [_flat(part) for part in segmentation]
    return None if None in parts else [part for part in parts if part is not None]


def _flat(part: object, wrapped: bool = True) -> Sequence[float] | None:
    """A polygon as [x, y, x, y, ...]; None if it isn't one.

    Accepted are flat numbers, points, and, if `wrapped`, either of them inside one more list.
    """
    if part is None:
        return []
    if isinstance(part, array):
        return part
    if not isinstance(part, Sequence) or isinstance(part, str | bytes):
        return None
    values = list(part)
    if all(map(_is_number, values)):
        return values
    if all(isinstance(value, str) for value in values):
        numbers = [found for value in values if (found := number(value)) is not None]
        return numbers if len(numbers) == len(values) else None
    points = [_point(value) for value in values]
    if None not in points:
        return [value for point in points for value in point or ()]
    return _flat(values[0], False) if wrapped and len(values) == 1 else None


def _point(value: object) -> tuple[float, float] | None:
    """A point from [x, y] or {"x": x, "y": y}."""
    if isinstance(value, Mapping) and set(value) == {"x", "y"}:
        value = [value["x"], value["y"]]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 2:
        return None
    return (value[0], value[1]) if all(map(_is_number, value)) else None


def _has_no_pixel(part: Sequence[float]) -> bool:
    """Whether a polygon has fewer than three points, so that it covers nothing."""
    return len(part) < 6 and all(number(value) is not None for value in part)


def _is_number(value: object) -> bool:
    return type(value) is int or type(value) is float


def _usual_rle(segmentation: Mapping[Any, Any], height: int, width: int, box: object) -> Mapping[Any, Any] | None:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if isinstance(counts, str) and _BYTES.fullmatch(counts):  # str(bytes) of Python
        try:
            counts = ast.literal_eval(counts).decode("ascii")
        except (ValueError, SyntaxError, MemoryError, RecursionError, AttributeError):
            return None
    if isinstance(counts, list):  # 480.0 is 480
        counts = [whole_number(value) if type(value) is float else value for value in counts]
    if size is not None:
        if not isinstance(size, Sequence) or isinstance(size, str | bytes):
            return None
        size = [whole_number(side) for side in size]
        if size == [height, width]:
            return {**segmentation, "size": size, "counts": counts}
        if size != [width, height]:
            return None
    found = []  # the counts may be those of the mask, or of the transposed mask
    for turned in (False, True):
        rows, columns = (width, height) if turned else (height, width)
        try:
            mask = masks.to_counts({"size": [rows, columns], "counts": counts}, rows, columns, "RLE")
        except MaskError:
            continue
        mask = masks.encode(masks.decode(mask, rows, columns).T) if turned else mask
        x0, y0, x1, y1 = rle.box_of(rle.read_runs(mask, height, width), height)
        if _is_near(box, (x0, y0, x1 - x0, y1 - y0)):
            found.append(mask)
    return {**segmentation, "size": [height, width], "counts": found[0]} if len(set(found)) == 1 else None


def _is_near(box: object, other: Sequence[float]) -> bool:
    """Whether a `bbox` is that of a mask, (x, y, width, height)."""
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)):
        return False
    return all(abs(one - two) <= _BOX_TOLERANCE for one, two in zip(box, other, strict=True))
