"""The charts of an evaluation show what evaluation.json holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.evaluation import plots
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.viz.charts import series_color, to_svg
from tests.evaluation.truth import perfect

CHARTS = ("precision_recall", "classes_precision_recall", "confusion", "calibration", "errors")


@pytest.fixture(scope="module")
def details(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = load_coco(write_sample(tmp_path_factory.mktemp("plots") / "set", images=(1, 3, 0)))["valid"]
    evaluator = Evaluator(rows)
    evaluator([one.above(0) for one in perfect(rows)][1:])
    return evaluator.details


def test_every_chart_of_an_evaluation_is_written_as_png(details: dict[str, Any], tmp_path: Path) -> None:
    paths = plots.write_plots(details, tmp_path)
    assert [path.name for path in paths] == [f"{name}.png" for name in CHARTS]
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 900


def test_a_run_has_one_colour_in_all_charts(details: dict[str, Any]) -> None:
    for draw in (plots.precision_recall, plots.reliability):
        (axes,) = draw({"first": details, "second": details}).axes
        assert [line.get_color() for line in axes.lines][:2] == [series_color(0), series_color(1)]


def test_precision_over_recall_is_drawn_at_three_ious_for_one_run(details: dict[str, Any]) -> None:
    figure = plots.precision_recall({"run": details})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["IoU 0.5", "IoU 0.75", "IoU 0.9"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == details["precision_recall"]["mean"]["0.5"]


def test_the_confusion_matrix_has_the_background_last(details: dict[str, Any]) -> None:
    (axes,) = plots.confusion_chart(details).axes
    names = [row["name"] for row in details["classes"]]
    assert [label.get_text() for label in axes.get_xticklabels()] == [*names, "background"]
    cells = {(text.get_position()[::-1]): int(text.get_text()) for text in axes.texts}
    size = len(names) + 1
    assert cells == {(true % size, said % size): count for true, said, count in details["confusion"]}
    assert "larger share of its row" in plots.confusion_caption(details)


def test_many_classes_show_their_largest_confusions_without_the_background() -> None:
    many = {"classes": [{"name": f"class {k}"} for k in range(30)]}
    many["confusion"] = [[1, 2, 5], [3, 3, 9], [4, 7, 8], [-1, 2, 50]]
    (axes,) = plots.confusion_chart(many).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["class 4\n> class 7", "class 1\n> class 2"]
    assert [text.get_text() for text in axes.texts] == ["8", "5"]
    assert "most frequent" in plots.confusion_caption(many)


def test_confusions_of_many_classes_with_long_names_can_be_told_apart() -> None:
    names = [f"class number {k} of the many" for k in range(30)]
    many = {"classes": [{"name": name} for name in names], "confusion": [[1, 2, 5], [3, 4, 2]]}
    (axes,) = plots.confusion_chart(many).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{names[1]}\n> {names[2]}",
        f"{names[3]}\n> {names[4]}",
    ]


def test_a_chart_of_many_classes_without_confusions_says_so() -> None:
    many = {"classes": [{"name": f"class {k}"} for k in range(30)], "confusion": [[3, 3, 9], [-1, 2, 50]]}
    figure = plots.confusion_chart(many)
    assert [text.get_text() for text in figure.axes[0].texts] == ["none"]
    assert ">none<" in to_svg(figure)
