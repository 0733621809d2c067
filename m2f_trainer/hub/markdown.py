"""Markdown from the templates in m2f_trainer/templates, with every value escaped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from m2f_trainer.viz.html import template_environment

if TYPE_CHECKING:
    from markupsafe import Markup


def render_markdown(template: str, **values: Any) -> str:
    """The text of a template, its values escaped by `escape` unless they are `verbatim`."""

    def finalize(value: Any) -> Any:
        return value if hasattr(value, "__html__") else verbatim(escape(str(value)))

    return template_environment(finalize=finalize, keep_trailing_newline=True).get_template(template).render(**values)


def verbatim(text: str) -> Markup:
    """Text that a template inserts unchanged: our own Markdown, or text that is already escaped."""
    from markupsafe import Markup

    return Markup(text)


def escape(text: str, code: bool = False) -> str:
    """One line of Markdown that shows the text and does nothing else; `code`: for backticks and code blocks."""
    line = re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+", " ", text).strip()[:200]
    if code:
        return re.sub(r"[`\"'\\<>]", "_", line)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:.@-])", r"\\\1", html.escape(line, quote=False))


def json_block(values: Mapping[str, Any]) -> Markup:
    """JSON for a code block. Characters that could end the block are written as JSON escapes."""
    text = json.dumps(values, indent=2)
    return verbatim(re.sub(r"[<>&`(]", lambda found: f"\\u{ord(found[0]):04x}", text))


def without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with each absolute path, at any depth, cut to its last part, so that no local folder is published."""
    return {key: _without_folder(value) for key, value in values.items()}


def _without_folder(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_folders(value)
    if isinstance(value, list):
        return [_without_folder(one) for one in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value
