"""Small charts as marks on a plane, drawn as SVG for pages or as PNG for folders and loggers.

A drawing is 320 units wide, so that on a phone its text is as large as on a desk.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

WIDTH, FONT = 320, 11
PALETTE = ("#3b82c4", "#d9782d", "#3f9a50", "#b0479b", "#c0392f", "#7a6ff0", "#8c6d46", "#1a9aa0")
INK, FAINT = "ink", "faint"  # as the page's text, and fainter


@dataclass(frozen=True)
class Line:
    """Joined points."""

    points: Sequence[Point]
    colour: str = INK


@dataclass(frozen=True)
class Box:
    """A filled rectangle; `strength` 0 to 1 is its opacity."""

    corner: Point
    size: Point
    colour: str = PALETTE[0]
    strength: float = 1.0


@dataclass(frozen=True)
class Text:
    """One line of text on its baseline; anchor is start, middle or end."""

    place: Point
    text: str
    anchor: str = "start"
    colour: str = INK


Mark = Line | Box | Text


@dataclass(frozen=True)
class Drawing:
    """Marks, the later over the earlier."""

    height: float
    marks: Sequence[Mark]


def series_colour(index: int) -> str:
    """The colour of the index-th series."""
    return PALETTE[index % len(PALETTE)]


def bars(rows: Sequence[tuple[str, float]], form: str = "{:g}") -> Drawing:
    """Horizontal bars, readable whatever the labels."""
    most = max((value for _, value in rows), default=0) or 1
    marks: list[Mark] = []
    for row, (label, value) in enumerate(rows):
        y, width = 16 * row, 170 * value / most
        marks += [
            Text((96, y + 11), label[:16], "end"),
            Box((102, y + 2), (width, 11)),
            Text((106 + width, y + 11), form.format(value)),
        ]
    return Drawing(16 * max(1, len(rows)), marks)


def lines(series: Mapping[str, Sequence[Point]], x_title: str, high: float | None = None) -> Drawing:
    """Curves over a common x from 0 on, y from 0 to `high` (the largest value unless given), with a legend."""
    points = [point for curve in series.values() for point in curve]
    right = max((x for x, _ in points), default=1) or 1
    top = high or round_above(max((y for _, y in points), default=1) or 1)
    left, bottom, wide, tall = 46.0, 168.0, 264.0, 156.0
    marks: list[Mark] = []
    for part in range(5):
        y = bottom - tall * part / 4
        marks += [Line([(left, y), (left + wide, y)], FAINT), Text((left - 4, y + 4), f"{top * part / 4:.3g}", "end")]
    places = zip((0, right / 2, right), ("start", "middle", "end"), strict=True)
    marks += [Text((left + wide * x / right, bottom + 14), f"{x:.6g}", anchor) for x, anchor in places]
    marks.append(Text((left + wide / 4, bottom + 14), x_title, "middle"))
    for index, (name, curve) in enumerate(series.items()):
        placed = [(left + wide * x / right, bottom - tall * min(max(y / top, 0.0), 1.0)) for x, y in curve]
        colour, y = series_colour(index), bottom + 32 + 15 * index
        marks += [Line(placed, colour), Box((left, y - 8), (14, 8), colour), Text((left + 20, y), name[:44])]
        marks += [Box((x - 1.5, y - 1.5), (3, 3), colour) for x, y in placed] if len(placed) < 30 else []
    return Drawing(bottom + 24 + 15 * len(series), marks)


def round_above(value: float) -> float:
    """The next of 1, 2, 4, 8 times a power of ten, so that a quarter of it reads well."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 2, 4, 8, 10) if unit * step >= value * (1 - 1e-9))


def squares(counts: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str]) -> Drawing:
    """A table of counts, darker where a row's share is larger; the columns are named by number, and listed below."""
    left = 92.0
    cell = min(32.0, (WIDTH - left) / max(1, len(columns)))
    marks: list[Mark] = [
        Text((left + cell * (column + 0.5), 11), str(column + 1), "middle") for column in range(len(columns))
    ]
    for row, values in enumerate(counts):
        y, total = 16 + cell * row, max(1, sum(values))
        marks.append(Text((left - 4, y + cell / 2 + 4), f"{row + 1} {rows[row][:12]}", "end"))
        for column, count in enumerate(values):
            x = left + cell * column
            marks.append(Box((x, y), (cell - 1, cell - 1), strength=0.04 + 0.9 * count / total))
            if count and cell >= 24:
                marks.append(Text((x + cell / 2 - 0.5, y + cell / 2 + 4), str(count), "middle"))
    return Drawing(20 + cell * len(rows), marks)


# as SVG


def svg(drawing: Drawing) -> str:
    """An inline SVG image; every text is escaped."""
    body = "".join(_element(mark) for mark in drawing.marks)
    return f'<svg viewBox="0 0 {WIDTH} {drawing.height:g}" role="img">{body}</svg>'


def _element(mark: Mark) -> str:
    if isinstance(mark, Text):
        (x, y), text = mark.place, html.escape(mark.text)
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{mark.anchor}" fill="{_css(mark.colour)}">{text}</text>'
    if isinstance(mark, Box):
        (x, y), (width, height) = mark.corner, mark.size
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        return f'<rect {place} fill="{_css(mark.colour)}" fill-opacity="{mark.strength:.2f}"/>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
    return f'<polyline points="{points}" fill="none" stroke="{_css(mark.colour)}" stroke-width="1.4"/>'


def _css(colour: str) -> str:
    return {INK: "currentColor", FAINT: "#8886"}.get(colour, colour)


# as a picture


def picture(drawing: Drawing, scale: int = 3) -> Image.Image:
    """The same on white, `scale` pixels a unit."""
    size = (WIDTH * scale, round((drawing.height + 6) * scale))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(size=FONT * scale)
    for mark in drawing.marks:
        _paint(draw, mark, scale, font)
    return image


def _paint(
    draw: ImageDraw.ImageDraw, mark: Mark, scale: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    ink = {INK: "#202020", FAINT: "#d8d8d8"}.get(mark.colour, mark.colour)
    if isinstance(mark, Text):
        place = (mark.place[0] * scale, mark.place[1] * scale)
        text = "".join(letter if letter.isprintable() else "?" for letter in mark.text)
        draw.text(place, text, fill=ink, font=font, anchor={"start": "ls", "middle": "ms", "end": "rs"}[mark.anchor])
    elif isinstance(mark, Box):
        (x, y), (width, height) = mark.corner, mark.size
        corners = (x * scale, y * scale, max(x, x + width - 0.3) * scale, max(y, y + height - 0.3) * scale)
        draw.rectangle(corners, fill=f"{ink}{round(255 * mark.strength):02x}")
    elif len(mark.points) > 1:
        draw.line([(x * scale, y * scale) for x, y in mark.points], fill=ink, width=max(1, scale // 2))


def save_png(drawing: Drawing, path: str | Path) -> Path:
    """Write it as PNG; returns the path."""
    target = Path(path)
    picture(drawing).save(target)
    return target
