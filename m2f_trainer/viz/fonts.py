"""Text of any script in pictures and charts: DejaVu Sans, and installed fonts for the characters that it lacks.

DejaVu Sans comes with matplotlib. It has Latin, Greek, Cyrillic, Arabic and more, but no Chinese, Japanese, Korean or
Devanagari. Neither Pillow nor matplotlib looks for another font by itself: they draw boxes. matplotlib is imported when
text is drawn; importing it takes 0.2 s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont

from m2f_trainer.errors import printable

logger = logging.getLogger(__name__)

PLAIN_STYLES = ("Regular", "Book", "Normal", "Roman", "Medium")
"""Names of upright styles of usual weight, which are preferred."""
NAMED = 10
"""Maximum number of names in the warning."""

_told: set[int] = set()
"""Code points that a warning has named."""


def text_size(text: str, size: float) -> tuple[float, float]:
    """Width and height, in pixels, of a line of text in fonts of `size` pixels."""
    baseline = _baseline(size)
    boxes = [(x, font.getbbox(piece, anchor="ls")) for x, piece, font in _placed(text, size)]
    return max((x + box[2] for x, box in boxes), default=0.0), max((baseline + box[3] for _, box in boxes), default=0.0)


def draw_text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: float, fill: tuple[int, int, int]
) -> None:
    """Write a line of text with its upper left corner at `place` (x, y)."""
    for x, piece, font in _placed(text, size):
        draw.text((place[0] + x, place[1] + _baseline(size)), piece, fill=fill, font=font, anchor="ls")


def families(texts: Iterable[str]) -> list[str]:
    """The font families that matplotlib needs for these texts, known to it; "DejaVu Sans" first."""
    return ["DejaVu Sans", *(_family(path) for path in _fonts(frozenset(map(ord, "".join(texts))) - _plain()))]


def warn_of_boxes(texts: Iterable[str]) -> None:
    """Log once which of these texts hold characters that no font of this machine has."""
    lines = [printable(text) for text in texts]
    missing = frozenset(map(ord, "".join(lines))) - _plain() - _told
    lacking = missing.difference(*(_characters(path) for path in _fonts(missing)))
    if lacking:
        _told.update(lacking)
        named = [line for line in dict.fromkeys(lines) if not lacking.isdisjoint(map(ord, line))]
        logger.warning(
            "Pictures: no font on this machine has all characters of %s name(s): %s. Boxes are drawn in their place. "
            "Install a font, such as Noto Sans CJK for Chinese, Japanese and Korean (fonts-noto-cjk on Debian and "
            "Ubuntu), or Noto Sans for other scripts (fonts-noto-core).",
            len(named), ", ".join(map(repr, named[:NAMED])) + ", ..." * (len(named) > NAMED),
        )  # fmt: skip


def _placed(text: str, size: float) -> Iterator[tuple[float, str, ImageFont.FreeTypeFont]]:
    """The pieces of a text that have a font in common, with their distance from the left."""
    x = 0.0
    for piece, path in _pieces(text):
        font = _load(path, size)
        yield x, piece, font
        x += font.getlength(piece)


@lru_cache(maxsize=1024)
def _pieces(text: str) -> list[tuple[str, Path]]:
    """A text and its fonts. One goes on as long as it has the characters, so that those of a script stay joined."""
    fonts = (_dejavu(), *_fonts(frozenset(map(ord, text)) - _plain()))
    pieces: list[tuple[str, Path]] = []
    for letter in text:
        if pieces and ord(letter) in _characters(pieces[-1][1]):
            pieces[-1] = (pieces[-1][0] + letter, pieces[-1][1])
        else:
            pieces.append((letter, next((path for path in fonts if ord(letter) in _characters(path)), fonts[0])))
    return pieces


@lru_cache(maxsize=64)
def _load(path: Path, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _baseline(size: float) -> int:
    """Pixels from the top of a line to its baseline, in every font."""
    return _load(_dejavu(), size).getmetrics()[0]


@cache
def _dejavu() -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _plain() -> frozenset[int]:
    """The code points of DejaVu Sans."""
    return _characters(_dejavu())


@cache
def _characters(path: Path) -> frozenset[int]:
    """The code points that a font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(path)).get_charmap())


@cache
def _family(path: Path) -> str:
    """The family of a font file, which is added to those that matplotlib knows: its stored list may be older.

    It is added as of normal weight, whatever the file says: matplotlib would warn of another one.
    """
    from matplotlib.font_manager import FontEntry, fontManager
    from matplotlib.ft2font import FT2Font

    name = FT2Font(str(path)).family_name
    fontManager.ttflist.append(FontEntry(fname=str(path), name=name, size="scalable"))
    return name


@lru_cache(maxsize=1024)
def _fonts(missing: frozenset[int]) -> tuple[Path, ...]:
    """Installed fonts that together have as many of these code points as possible; the one with most of them first."""
    fonts: list[Path] = []
    rest = np.array(sorted(missing), np.uint32)
    while len(rest):
        path, found = max(((path, np.isin(rest, codes)) for path, codes in _installed()), key=lambda one: one[1].sum())
        if not found.any():
            break
        fonts.append(path)
        rest = rest[~found]
    return tuple(fonts)


@cache
def _installed() -> list[tuple[Path, NDArray[np.uint32]]]:
    """The fonts of this machine with their code points; first those of usual weight, in the order of their names."""
    from matplotlib.font_manager import findSystemFonts
    from matplotlib.ft2font import FT2Font

    fonts = [(1, _dejavu(), np.array([], np.uint32))]
    for path in sorted(findSystemFonts()):
        try:
            face = FT2Font(path)
            is_usable = face.scalable and "LastResort" not in face.family_name.replace(" ", "")
            codes = np.fromiter(face.get_charmap(), np.uint32) if is_usable else None
        except (OSError, RuntimeError):  # no font that FreeType reads
            continue
        if codes is not None:
            fonts.append((face.style_name not in PLAIN_STYLES, Path(path), codes))
    return [(path, codes) for _, path, codes in sorted(fonts, key=lambda one: one[:2])]
