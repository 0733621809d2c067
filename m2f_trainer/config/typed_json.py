"""Read JSON strictly, and check its values against Python types."""

import json
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from m2f_trainer.errors import RecipeError

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", NoneType: "null"}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises RecipeError for broken JSON, duplicate keys and NaN."""
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"), f"in {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Can't read {path}: {error}.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected one JSON object of options, got {describe_type(type(values))}.")
    return values


def parse_json(text: str, where: str) -> Any:
    """`json.loads` without duplicate keys, NaN and Infinity. Raises RecipeError."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        for key, _ in items if len(values) < len(items) else []:
            times = [name for name, _ in items].count(key)
            if times > 1:
                raise RecipeError(f"The key {key!r} occurs {times} times {where}. Keep one of them.")
        return values

    def refuse(constant: str) -> NoReturn:
        raise RecipeError(f"Found {constant} {where}: expected a finite number.")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # an integer with too many digits raises a plain ValueError
        raise RecipeError(f"Broken JSON {where}: {error}.") from error


def leaves(value: object) -> Iterator[object]:
    """The scalars in nested lists and objects."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list):
        yield value
        return
    for one in value:
        yield from leaves(one)


def is_finite(value: object) -> bool:
    """Whether a value contains no NaN and no infinity, at any depth."""
    return all(math.isfinite(leaf) for leaf in leaves(value) if isinstance(leaf, float))


def has_type(value: object, hint: Any) -> bool:
    """Whether a JSON value has a type: an int counts as a float, a bool never as a number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(has_type(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(has_type(one, inner[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)
    return type(value) is (origin or hint)


def takes_object(hint: Any) -> bool:
    """Whether a JSON object is a valid value of a type."""
    return has_type({}, hint)


def describe_type(hint: Any) -> str:
    """A type in words: 'a whole number or null'."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(json.dumps(one) for one in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe_type(one) for one in inner))
    if hint is list or origin is list:
        return f"a list of {describe_type(inner[0]).removeprefix('a ')}s" if inner else "a list"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return WORDS[str]
    return WORDS.get(hint, "an object")
