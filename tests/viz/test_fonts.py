"""Names of any script are drawn in a font of this machine that has their characters, or named in the log."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw
from PIL.ImageFont import truetype
from scipy.ndimage import distance_transform_cdt

from m2f_trainer.viz.fonts import draw_text, text_size, warn_of_boxes

CAT = "\u732b"
"""A Chinese character that DejaVu Sans lacks."""

DRAW = """
import json, sys, numpy as np
from pathlib import Path
from PIL import Image
from m2f_trainer.viz.charts import bar_chart, save_png
from m2f_trainer.viz.overlay import add_legend, choose_style

cat, output = "\\u732b", Path(sys.argv[1])
labels = choose_style((480, 640), np.array([[9.0, 99, 300, 300]]), [1], [0.9], {1: cat, 2: "dog"}).labels
legend = {f"a {name} b": (255, 0, 0) for name in (cat, "x")}
add_legend(Image.new("RGB", (400, 10), "white"), legend).save(output / "legend.png")
save_png(bar_chart([(cat, 1.0), ("dog", 2.0)]), output / "chart.png")
print(json.dumps(labels))
"""


def make_font(path: Path, characters: str) -> None:
    """A font whose glyph of each character is a filled square of one em."""
    pen = TTGlyphPen(None)
    for number, corner in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(one): "square" for one in characters})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=1000, usWeightClass=500)
    font.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    font.save(path)


def drawn(home: Path, output: Path) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
    """Legend and chart, grey, the log and the labels of a process whose user has the fonts of `home`."""
    output.mkdir()
    environment = {**os.environ, "XDG_DATA_HOME": str(home), "MPLCONFIGDIR": str(output)}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(output)], capture_output=True, text=True, check=True, env=environment
    )
    legend, chart = (np.asarray(Image.open(output / f"{name}.png").convert("L")) for name in ("legend", "chart"))
    return legend, chart, done.stderr, json.loads(done.stdout)


def largest_square(picture: np.ndarray) -> int:
    """The side, an odd number, of the largest square of dark pixels."""
    dark = np.pad(picture < 60, 1)
    return 2 * int(distance_transform_cdt(dark, "chessboard").max()) - 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray, str, list[str]]]:
    folder = tmp_path_factory.mktemp("fonts")
    make_font(folder / "home/fonts/squares.ttf", CAT)
    (folder / "home/fonts/damaged.ttf").write_bytes(b"no font")
    return {"with": drawn(folder / "home", folder / "with"), "without": drawn(folder / "nothing", folder / "without")}


def test_a_name_is_drawn_in_an_installed_font_that_has_its_characters(pictures) -> None:
    legend, chart, log, labels = pictures["with"]
    assert largest_square(legend) >= 9, "the glyph is a filled square of 11 pixels"
    assert largest_square(chart) >= 25, "9 points at 250 dots per inch are 31 pixels"
    assert "font" not in log
    assert labels == [f"{CAT} 90%"]


def test_a_name_that_no_font_has_is_a_box_and_named_once_in_the_log(pictures) -> None:
    legend, chart, log, _ = pictures["without"]
    assert largest_square(legend) < 5
    assert largest_square(chart) < 25
    assert log.count("no font on this machine has all characters of 1 name(s)") == 1
    assert f"{CAT!r}. Boxes are drawn" in log
    assert "Noto Sans CJK" in log


def test_text_in_a_font_of_matplotlib_is_drawn_as_pillow_draws_it() -> None:
    import matplotlib

    font = truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 17.0)
    ours, theirs = Image.new("RGB", (200, 40)), Image.new("RGB", (200, 40))
    draw_text(ImageDraw.Draw(ours), (2.5, 3.0), "кот 90% Äg", 17.0, (255, 0, 0))
    ImageDraw.Draw(theirs).text((2.5, 3.0), "кот 90% Äg", (255, 0, 0), font)
    assert (np.asarray(ours) == np.asarray(theirs)).all()
    box = ImageDraw.Draw(ours).textbbox((0, 0), "кот 90% Äg", font)
    assert text_size("кот 90% Äg", 17.0) == box[2:]
    assert text_size("", 17.0) == (0, 0)


def test_names_that_can_be_drawn_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_boxes(["кот", "γάτα", "قطة", "cat"])
    assert not caplog.records
