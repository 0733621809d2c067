"""One row per recipe field: its default, help, theme and range, and what a change of it means to a resumed run.

    tile_size: int | None = option(None, "Train on tiles of this side, in pixels.", "data", at_least=64)

The help of `m2f train`, the range checks, the settings compared on resume, the dry run and the model card are all
derived from these rows. Adding a field takes its row and the code that uses it.
"""

from dataclasses import dataclass, field, fields
from inspect import get_annotations
from typing import Any, Literal

from m2f_trainer.errors import RecipeError

Theme = Literal[
    "data",
    "augmentation",
    "model",
    "LoRA (with --tune lora)",
    "length and batch",
    "learning rate and optimizer",
    "evaluation and best checkpoint",
    "checkpoints and resumption",
    "precision and memory",
    "machine",
    "logs and uploads",
    "fixed or derived (not to be set)",
]
"""The headings of `m2f train --help`, in its order."""


@dataclass(frozen=True)
class Option:
    """The row of a recipe field: all that is known of it besides its name and type.

    Attributes:
        help: one or two sentences for `m2f train --help`.
        at_least, at_most: inclusive bounds of a number; None where unbounded.
        changes_results: a resumed run must have the same value, unless `allow_changes` is set. A checkpoint written
            before the field existed counts as having `before`.
        defines_model: no checkpoint can be carried over to another value, not even with `allow_changes`.
        auto: the word "auto" is accepted instead of a number; `training/auto.py` resolves it.
        json_type: a type that JSON may hold here instead of a string.
        saved: False for fields that recipe.json leaves out: derived ones, and those of one person or process.
        before: what runs did before the field existed; left out where that is the default.
    """

    default: Any
    help: str
    theme: Theme
    at_least: float | None = None
    at_most: float | None = None
    changes_results: bool = False
    defines_model: bool = False
    auto: bool = False
    json_type: type | None = None
    saved: bool = True
    before: Any = ...


def option(default: Any, help: str, theme: Theme, **properties: Any) -> Any:
    """A dataclass field with its row, see `Option`; a list default is copied for each instance."""
    if properties.get("defines_model"):
        properties["changes_results"] = True
    metadata = {"help": help, "option": Option(default, help, theme, **properties)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(group: type) -> dict[str, Option]:
    """Field name -> row of a dataclass, in the order of declaration; inherited fields without a row are left out."""
    rows = {one.name: one.metadata["option"] for one in fields(group) if "option" in one.metadata}
    declared = [name for parent in group.__mro__ for name in get_annotations(parent)]
    return {name: rows[name] for name in dict.fromkeys(declared) if name in rows}


def check_ranges(arguments: object) -> None:
    """Check that every number among the fields of a dataclass is within its bounds; None and "auto" are no numbers.

    Raises:
        RecipeError: one isn't; the message names the field, its bounds and the value.
    """
    for name, row in options_of(type(arguments)).items():
        value, low, high = vars(arguments)[name], row.at_least, row.at_most
        if not isinstance(value, int | float):
            continue
        if (low is not None and value < low) or (high is not None and value > high):
            if low is not None and high is not None:
                expected = f"between {low} and {high}"
            else:
                expected = f"at least {low}" if low is not None else f"at most {high}"
            raise RecipeError(f"{name}: expected {expected}, got {value}.")
