"""Charts as matplotlib figures, written as SVG for pages and as PNG for folders.

Figures are made without pyplot, so drawing changes no global state and needs no display. Labels may come from untrusted
files: they are drawn as plain text, never parsed as mathematics. matplotlib is imported when a chart is made.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f_trainer.errors import printable
from m2f_trainer.run_folder import write_atomically
from m2f_trainer.viz.fonts import families, warn_of_boxes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

WIDTH = 3.6  # inches; pages show charts at least 300 pixels wide, so that text of 9 points is at least 10 pixels high
PALETTE = ("#3b82c4", "#d9782d", "#3f9a50", "#b0479b", "#c0392f", "#7a6ff0", "#8c6d46", "#1a9aa0")
GRID = "#88888866"
STYLE: dict[str, Any] = {
    "axes.edgecolor": "#888888",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font and colour
    "text.parse_math": False,  # "$" is a character of a name
    "xtick.color": "#888888",
    "xtick.labelcolor": "black",
    "ytick.color": "#888888",
    "ytick.labelcolor": "black",
}


def series_color(index: int) -> str:
    """The colour of the index-th series."""
    return PALETTE[index % len(PALETTE)]


def bar_chart(rows: Sequence[tuple[str | tuple[str, ...], float]], value_format: str = "{:g}") -> Figure:
    """Horizontal bars, one for each (label, value), with the value at the end of the bar; "none" without any.

    A label is a line of at most 20 characters, or a tuple of several lines of at most 30.
    """
    labels = [
        plain_text(label, 20) if isinstance(label, str) else "\n".join(plain_text(line, 30) for line in label)
        for label, _ in rows
    ]
    with _axes(0.15 + 0.2 * max(1, sum(1 + label.count("\n") for label in labels)), labels) as (figure, axes):
        places, values = range(len(rows)), [value for _, value in rows]
        drawn = axes.barh(places, values, color=PALETTE[0], height=0.7)
        axes.bar_label(drawn, [value_format.format(value) for value in values], padding=2)
        axes.set_yticks(places, labels)
        if not rows:
            axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
    return figure


def line_chart(
    series: Mapping[str, Sequence[Point]], x_label: str, y_label: str = "", y_max: float | None = None
) -> Figure:
    """Curves over a common x axis, both axes from zero.

    Args:
        series: name -> (x, y) points; a curve of fewer than 30 points has markers. Names are in a legend below the
            chart, unless the only one is empty.
        y_max: the end of the y axis; by default it follows from the values.
    """
    named = [name for name in series if name]
    with _axes(2.2 + 0.2 * len(named), named) as (figure, axes):
        drawn = [
            axes.plot(*zip(*points, strict=True), color=series_color(index), marker="o" if len(points) < 30 else "")[0]
            for index, points in enumerate(series.values())
            if points
        ]
        axes.grid(color=GRID, linewidth=0.6)
        points = [point for curve in series.values() for point in curve]
        x_end, y_end = (max((point[axis] for point in points), default=0) for axis in (0, 1))
        axes.set_xlim(0, 1.02 * x_end or 1)  # room for the marker at the end
        axes.set_ylim(0, 1.02 * y_max if y_max else 1.05 * y_end or 1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if named:
            labels = [plain_text(name, 40) for name, points in series.items() if points]
            figure.legend(drawn, labels, loc="outside lower left", frameon=False)
    return figure


def matrix_chart(counts: Sequence[Sequence[int]], labels: Sequence[str], x_label: str, y_label: str) -> Figure:
    """A square table of counts, (n, n); a cell is darker where it holds a larger share of its row."""
    from matplotlib.colors import to_rgba

    size = len(labels)
    with _axes(min(WIDTH, 1.3 + 0.4 * size), labels) as (figure, axes):
        strengths = [[0.04 + 0.8 * count / max(1, sum(row)) for count in row] for row in counts]
        axes.imshow([[to_rgba(PALETTE[0], alpha) for alpha in row] for row in strengths], aspect="auto")
        for row, values in enumerate(counts):
            for column, count in enumerate(values):
                if count:
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=9 if size < 8 else 7)
        names = [plain_text(label, 16) for label in labels]
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.tick_params(left=False, bottom=False)
        axes.spines[:].set_visible(False)
    return figure


def plain_text(text: str, length: int) -> str:
    """One line of printable characters, cut to `length` of them."""
    line = printable(text)
    return line if len(line) <= length else line[: length - 1] + "…"


def to_svg(figure: Figure, key: str = "") -> str:
    """An `<svg>` element for a page, equal for equal figures.

    Args:
        key: the ids inside are derived from it; each chart of a page needs a different one.
    """
    buffer = io.StringIO()
    with _style({"svg.hashsalt": f"m2f_trainer {key}"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # ids of groups, which nothing refers to
    return re.sub(r' (width|height)="[^"]*pt"', "", text, count=2).strip()  # the page decides the size


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG; return the path."""
    from matplotlib.text import Text

    buffer = io.BytesIO()
    with _style({}):
        figure.savefig(buffer, format="png", dpi=250)
    warn_of_boxes(text.get_text() for text in figure.findobj(Text))
    return write_atomically(path, buffer.getvalue())


@contextmanager
def _axes(height: float, labels: Sequence[str]) -> Iterator[tuple[Figure, Axes]]:
    """A new figure of `WIDTH` x `height` inches, in fonts that have the labels, and its axes, to be filled within the
    context.
    """
    with _style({"font.family": families(map(printable, labels))}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


@contextmanager
def _style(more: Mapping[str, Any]) -> Iterator[None]:
    """matplotlib's defaults with our `STYLE`; the user's matplotlibrc is ignored."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams  # its keys are literals to mypy
        parameters.update(STYLE)
        parameters.update(more)
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # `warn_of_boxes` tells of those in a PNG
        yield
