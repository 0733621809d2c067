"""The help text of the recipe fields, for `m2f train --help`."""

import textwrap
from typing import get_args

from m2f_trainer.config.fields import Theme
from m2f_trainer.config.recipe import accepted_values, rows

PLACEHOLDERS = {
    "a string": "TEXT", "a whole number": "N", "a number": "X", "an object": "JSON", "true or false": "true|false",
    "a list of strings": "TEXT ...", "a list of whole numbers": "N ...", "a list of numbers": "X ...",
}  # fmt: skip
COLUMN, WIDTH = 38, 110


def help_of_fields() -> str:
    """The help text of every field with a row, grouped by theme."""
    lines = []
    for theme in get_args(Theme):
        lines += [f"{theme}:", *(help_of_field(name) for name, row in rows().items() if row.theme == theme), ""]
    return "\n".join([*lines, "Every other field of transformers.TrainingArguments is accepted under its own name."])


def help_of_field(name: str) -> str:
    """One field: its name and values on the left, then what it does and [its default]."""
    row = rows()[name]
    default = str(row.default).lower() if isinstance(row.default, bool) else row.default
    shown = "" if default is None or isinstance(default, list) else f" [{default}]"
    text = textwrap.wrap(row.help + shown, WIDTH - COLUMN)
    left = f"  --{name} {usage_of_values(name)}"
    first = [left.ljust(COLUMN) + text.pop(0)] if len(left) < COLUMN else [left]
    return "\n".join([*first, *(" " * COLUMN + line for line in text)])


def usage_of_values(name: str) -> str:
    """The values of a field as in a usage line: 'N|auto'."""
    text = accepted_values(name).replace('"', "")
    for words, placeholder in sorted(PLACEHOLDERS.items(), key=lambda item: -len(item[0])):
        text = text.replace(words, placeholder)
    return "|".join(part for part in text.split(" or ") if part != "null")
