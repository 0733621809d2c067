"""The objects of an image as dataset rows have them: a list of objects, or an object of lists."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m2f_trainer.data.normalize import is_text, type_name
from m2f_trainer.errors import DataError
from m2f_trainer.masks.rle import brief

CATEGORY_KEYS = ("category_id", "category", "categories", "label", "labels", "class")
MASK_KEYS = ("segmentation", "segmentations", "segments", "polygons", "counts")


CategoryFields = tuple[str | None, int | None]
"""Name and number of an object's category; None for what it lacks."""


def category_of(one: Mapping[str, Any], keys: Sequence[str] = CATEGORY_KEYS) -> CategoryFields:
    """The category of an object from the fields `keys`: a name that isn't blank, and a number of 64 bits."""
    values = [one.get(key) for key in keys]
    names = (str(value) for value in values if is_text(value) and str(value).strip())
    numbers = (value for value in values if type(value) is int and abs(value) < 2**63)
    return next(names, None), next(numbers, None)


def with_one_only(categories: Iterable[CategoryFields]) -> tuple[list[int], list[str]]:
    """The numbers of categories without a name, and the names of those without a number.

    Without the former, names are a dataset's categories; otherwise numbers, unless there are some of both: see
    `mixed_categories`.
    """
    found = set(categories)
    unnamed = sorted(number for name, number in found if name is None and number is not None)
    return unnamed, sorted(name for name, number in found if number is None and name is not None)


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
