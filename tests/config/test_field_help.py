"""The help of a recipe's fields."""

from dataclasses import fields

from m2f_trainer.config.field_help import OTHERS, THEMES, WIDTH, describe, describe_fields
from m2f_trainer.config.recipe import GROUPS, NOT_SAVED


def test_every_field_of_ours_stands_in_the_help_once() -> None:
    ours = {one.name for group in GROUPS for one in fields(group) if one.name in group.__annotations__}
    named = [name for names in THEMES.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) == (ours - NOT_SAVED) | set(OTHERS)


def test_the_help_says_what_a_field_takes_and_its_default_in_lines_that_fit() -> None:
    lines = describe_fields().splitlines()
    assert max(map(len, lines)) <= WIDTH
    (tune,) = [line for line in lines if line.startswith("  --tune ")]
    assert tune.startswith("  --tune frozen|lora|full  ")
    assert describe("learning_rate").endswith("[0.0001]")
    assert describe("learning_rate").startswith("  --learning_rate X|auto  ")
    assert describe("horizontal_flip").startswith("  --horizontal_flip true|false  ")
    assert describe("horizontal_flip").endswith("[true]")
    assert describe("pyramid_taps").startswith("  --pyramid_taps N ...  ")
