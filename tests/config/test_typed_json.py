"""Strict JSON: what is read, and which values have which types."""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers.trainer_utils import SchedulerType

from m2f_trainer.config.typed_json import (
    describe_type,
    has_type,
    is_finite,
    leaves,
    parse_json,
    read_object,
    takes_object,
)
from m2f_trainer.errors import RecipeError


@pytest.mark.parametrize(
    ("hint", "values", "others"),
    [
        (int, [1, -1], [1.0, True, "1", None]),
        (float, [1, 1.5], [True, "1"]),
        (bool, [True, False], [0, 1, "true"]),
        (str, ["", "a"], [1, None]),
        (int | None, [1, None], ["null", 1.5]),
        (list[int], [[], [1, 2]], [[1, "2"], [True], 1]),
        (list[float] | None, [None, [1, 2.5]], [["a"]]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0]),
        (dict[str, Any] | str, [{}, {"a": [1]}, "a"], [[], 1]),
        (SchedulerType | str, ["cosine", "step"], [1, None]),
    ],
)
def test_a_value_has_its_type_and_no_other(hint: Any, values: list[Any], others: list[Any]) -> None:
    assert all(has_type(value, hint) for value in values)
    assert not any(has_type(value, hint) for value in others)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "a whole number or null"),
        (Literal["a", "b"], '"a" or "b"'),
        (list[str], "a list of strings"),
        (dict[str, Any] | str | None, "an object or a string or null"),
        (SchedulerType | str, "a string"),
    ],
)
def test_a_type_is_described_in_words(hint: Any, words: str) -> None:
    assert describe_type(hint) == words


def test_scalars_are_found_at_any_depth() -> None:
    value = {"a": [1, {"b": "x"}], "c": None}
    assert list(leaves(value)) == [1, "x", None]
    assert is_finite(value)
    assert not is_finite({"a": [1, {"b": math.nan}]})


def test_only_types_with_an_object_among_them_take_one() -> None:
    assert takes_object(dict[str, Any] | str)
    assert not takes_object(str | None)


def test_a_file_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + b'{"a": [1, 2.5, null, "\xc3\xa9"]}')
        assert read_object(path) == {"a": [1, 2.5, None, "\u00e9"]}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    for path in (tmp_path / "latin.json", tmp_path / "missing.json"):
        with pytest.raises(RecipeError, match=f"Can't read {path}"):
            read_object(path)


def test_equal_keys_of_different_objects_are_no_duplicates() -> None:
    assert parse_json('{"a": {"x": 1}, "b": {"x": 2}}', "here") == {"a": {"x": 1}, "b": {"x": 2}}
    with pytest.raises(RecipeError, match="The key 'x' occurs 3 times here"):
        parse_json('{"a": {"x": 1, "y": 2, "x": 3, "x": 4}}', "here")
