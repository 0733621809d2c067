"""The objects of an image as dataset rows have them: a list of objects, or an object of lists."""

from collections.abc import Mapping
from typing import Any

from m2f_trainer.data.normalize import is_text, type_name
from m2f_trainer.errors import DataError

CATEGORY_KEYS = ("category_id", "category", "categories", "label", "labels", "class")
MASK_KEYS = ("segmentation", "segmentations", "segments", "polygons", "counts")


def category_of(one: Mapping[str, Any]) -> int | None:
    """The category id of an object; None if it has no integer of 64 bits as category."""
    numbers = (one[key] for key in CATEGORY_KEYS if type(one.get(key)) is int)
    return next((int(number) for number in numbers if abs(number) < 2**63), None)


def category_name(one: Mapping[str, Any]) -> str | None:
    """The name of an object's category; None if it has none."""
    return next((one[key] for key in CATEGORY_KEYS if is_text(one.get(key))), None)


def split_objects(objects: Any, where: str) -> list[Any]:
    """The objects of a row one by one, from a list of objects or an object of lists.

    Raises:
        DataError: it is neither
    """
    if isinstance(objects, list):
        return objects
    if not isinstance(objects, Mapping):
        raise DataError(
            f"{where}: expected a list as objects, got a {type_name(objects)}. Write an empty list for no objects."
        )
    lists = {key: value for key, value in objects.items() if isinstance(value, list)}
    lengths = {key: len(value) for key, value in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {key}" for key, count in lengths.items())
        raise DataError(f"{where}: expected one value of each field per object, got {found}. Add the missing values.")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
