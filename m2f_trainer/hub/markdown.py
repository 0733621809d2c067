"""Words and values of strangers as harmless Markdown."""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any


def escape(text: str, code: bool = False) -> str:
    """Text as one harmless line of Markdown; `code` for text inside backticks or a code block."""
    line = re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+", " ", text).strip()[:200]
    if code:
        return re.sub(r"[`\"'\\<>]", "_", line)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:.@-])", r"\\\1", html.escape(line, quote=False))


def percent(value: float) -> str:
    """A share as percent; "-" where there was no truth."""
    return "-" if value < 0 else f"{100 * value:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of cells that are Markdown already, with an empty line after it."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def code(values: Mapping[str, Any]) -> list[str]:
    """A block of JSON, which stays a block whatever is in it: JSON has escapes for every character."""
    text = re.sub(r"[<>&`(]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(values, indent=2))
    return ["```json", *text.splitlines(), "```"]


def without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with each absolute path cut to its last part, at any depth: the world need not know your folders."""
    return {key: _without_folder(value) for key, value in values.items()}


def _without_folder(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_folders(value)
    if isinstance(value, list):
        return [_without_folder(one) for one in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value
