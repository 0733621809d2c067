"""The objects of an image as dataset rows have them: a list of objects, or an object of lists."""

from collections.abc import Mapping, Sequence
from typing import Any

from m2f_trainer.data.normalize import is_text, type_name
from m2f_trainer.errors import DataError
from m2f_trainer.masks.rle import brief

CATEGORY_KEYS = ("category_id", "category", "categories", "label", "labels", "class")
MASK_KEYS = ("segmentation", "segmentations", "segments", "polygons", "counts")


def category_of(one: Mapping[str, Any], keys: Sequence[str] = CATEGORY_KEYS) -> int | str | None:
    """The category of an object: its name, or its number of 64 bits if it has no name; None if it has neither.

    keys: the fields of an object that may hold its category
    """
    values = [one.get(key) for key in keys]
    names = (value for value in values if isinstance(value, str) and is_text(value))
    numbers = (value for value in values if type(value) is int and abs(value) < 2**63)
    return next(names, next(numbers, None))


def mixed_categories(where: str, number: int, name: str) -> DataError:
    """The error for objects of which some have a number as category, such as `number`, and others only a name."""
    return DataError(
        f"{where}: some objects have a number as category, such as {number}, and others only a name, such as"
        f" {brief(name)}. Give all a number, or all a name."
    )


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
