"""HTML pages from the templates in m2f_trainer/templates: self-contained, with every value escaped.

A page holds its style, charts (SVG) and pictures (JPEG). Its content security policy forbids every script but the
page's own, which is named by its digest, and every request; the page of `m2f serve` may ask its own server.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from m2f_trainer.viz.charts import to_svg

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """A table of plain values; if `sortable`, its column heads are buttons that sort it."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    sortable: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart on a page: an `<svg>` element, its title above it, and lines of plain text below it."""

    title: str
    svg: Markup
    caption: Sequence[str] = ()


@dataclass(frozen=True)
class Photo:
    """A picture on a page: a `data:` address, the alternative text, and lines of plain text below it."""

    name: str
    source: str
    caption: Sequence[str] = ()


def chart(title: str, figure: Figure, *caption: str) -> Chart:
    """A figure as a page shows it; charts of one page need different titles."""
    from markupsafe import Markup

    return Chart(title, Markup(to_svg(figure, title)), caption)


def photo(image: Image.Image, name: str, caption: Sequence[str]) -> Photo:
    """An image as a page shows it, as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return Photo(name, f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", caption)


def template_environment(**options: Any) -> Environment:
    """Jinja2 for this package's templates: values are escaped, and an undefined name is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("m2f_trainer"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        **options,
    )


def render_page(template: str, *, script: str | None = None, requests: bool = False, **values: Any) -> str:
    """The text of a page.

    Args:
        template: a file of m2f_trainer/templates that extends page.html.
        script: the file of the page's script; sort.js sorts tables by the buttons in their heads.
        requests: allow the script to ask the server that the page came from.
        values: the variables of the template; `title` is the title of the window.
    """
    from markupsafe import Markup

    environment = template_environment()
    code = environment.get_template(script).render() if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode("ascii")
    scripts = f"'sha256-{digest}'" if script else "'none'"
    own_server = "'self'" if requests else "'none'"
    policy = (
        # matplotlib writes style attributes, which no digest can allow
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}; "
        f"connect-src {own_server}; base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(policy=policy, script=Markup(code), **values)
