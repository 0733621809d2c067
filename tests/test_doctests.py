"""The examples in docstrings are true, without network."""

import doctest
import importlib

import pytest

MODULES = ("inference.instances", "masks.polygons", "inference.predictor", "data.tiles")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_docstring_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"m2f_trainer.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
