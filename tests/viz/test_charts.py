"""Charts show their values, keep hostile labels as text, and are equal for equal values."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from m2f_trainer.viz.charts import bar_chart, line_chart, matrix_chart, plain_text, save_png, series_color, to_svg

HOSTILE = ["<script>alert(1)</script>", "$\\frac{x", "_hidden", "\x1b[31m\nred", "\U0001f600 \u732b"]


def texts(figure: Figure) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(to_svg(figure)).iter() if "text" in element.tag]


def charts_of(names: list[str]) -> dict[str, Figure]:
    counts = [[3] * len(names)] * len(names)
    return {
        "bars": bar_chart([(name, 2.0) for name in names]),
        "lines": line_chart({name: [(0, 0.5), (1, 0.7)] for name in names}, "step"),
        "matrix": matrix_chart(counts, names, "predicted", "ground truth"),
    }


@pytest.mark.parametrize("kind", ["bars", "lines", "matrix"])
def test_labels_stay_text_whatever_is_in_them(kind: str, tmp_path: Path) -> None:
    figure = charts_of(HOSTILE)[kind]
    assert {plain_text(name, 10) for name in HOSTILE} <= {plain_text(text, 10) for text in texts(figure)}
    assert "<script" not in to_svg(figure)
    assert np.asarray(Image.open(save_png(figure, tmp_path / "chart.png"))).min() < 100, "ink on white"


def test_equal_charts_are_equal_files(tmp_path: Path) -> None:
    for kind in ("bars", "lines", "matrix"):
        first, second = (charts_of(["a", "b"])[kind] for _ in range(2))
        assert to_svg(first) == to_svg(second)
        save_png(first, tmp_path / "first.png")
        save_png(second, tmp_path / "second.png")
        assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_ids_differ_between_charts_of_one_page_and_every_reference_has_its_id() -> None:
    pages = [to_svg(charts_of(["a", "b"])["lines"], key) for key in ("first", "second")]
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in pages]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', pages[0])) <= ids[0]


def test_a_curve_ends_where_its_values_say() -> None:
    (axes,) = line_chart({"a": [(0, 0.0), (10, 0.8)], "b": [(5, 0.4)], "none": []}, "step", "AP", 1.0).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 0], [10, 0.8]], [[5, 0.4]]]
    assert axes.get_ylim()[1] == pytest.approx(1.02)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "AP")


def test_the_last_point_of_a_curve_is_inside_the_axes() -> None:
    """Axes that end at the last point cut its marker off: of a run with one evaluation, nothing would be seen."""
    (axes,) = line_chart({"a": [(654, 23.3)], "b": [(671, 27.0)]}, "step").axes
    assert 671 < axes.get_xlim()[1] < 700
    assert 27 < axes.get_ylim()[1] < 30


def test_a_series_keeps_its_colour_when_another_has_no_points() -> None:
    (axes,) = line_chart({"a": [], "b": [(0, 1), (1, 2)]}, "step").axes
    assert [line.get_color() for line in axes.lines] == [series_color(1)]


def test_bars_show_their_values_the_first_at_the_top() -> None:
    figure = bar_chart([("first", 20.0), ("second", 5.0)], "{:.1f}")
    assert texts(figure) == ["first", "second", "20.0", "5.0"]
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [20, 5]
    assert figure.axes[0].yaxis_inverted()


def test_charts_of_nothing_can_be_drawn() -> None:
    for figure in (bar_chart([]), line_chart({}, "step"), matrix_chart([[0]], ["background"], "x", "y")):
        assert to_svg(figure).startswith("<svg")


def test_charts_leave_the_settings_of_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    to_svg(charts_of(["a"])["lines"])
    assert dict(matplotlib.rcParams) == before
