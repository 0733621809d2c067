"""Charts of one evaluation, or of several in one chart: for reports, and as PNG beside evaluation.json.

Each function takes the content of an evaluation.json (`details`), or several such contents by name of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f_trainer.viz.charts import bar_chart, line_chart, matrix_chart, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX_CLASSES = 12  # a confusion matrix of more classes is unreadable: the largest confusions are shown instead
RECALLS = [place / 100 for place in range(101)]

Details = Mapping[str, Any]


def precision_recall(runs: Mapping[str, Details]) -> Figure:
    """Precision over recall, mean of the classes: of one run at three IoUs, of several runs at IoU 0.5."""
    series = {}
    for name, details in runs.items():
        curves = details["precision_recall"]["mean"]
        for iou in curves if len(runs) == 1 else ("0.5",):
            label = f"IoU {iou}" if len(runs) == 1 else name
            series[label] = list(zip(RECALLS, curves[iou], strict=False))  # no values where no class has objects
    return line_chart(series, "recall", "precision", 1.0)


def class_precision_recall(details: Details) -> Figure:
    """Precision over recall at IoU 0.5 of the six classes with the most objects."""
    ranked = sorted(range(len(details["classes"])), key=lambda index: -details["classes"][index]["objects"])
    curves = {details["classes"][index]["name"]: details["precision_recall"]["classes"][index] for index in ranked[:6]}
    series = {name: list(zip(RECALLS, curve, strict=True)) for name, curve in curves.items() if curve}
    return line_chart(series, "recall", "precision", 1.0)


def reliability(runs: Mapping[str, Details]) -> Figure:
    """Reliability diagram: share of correct predictions over mean score, in ten score bins."""
    series = {}
    for name, details in runs.items():
        bins = details["calibration"]
        points = zip(bins["score"], bins["correct"], bins["count"], strict=True)
        series[name] = [(score, correct) for score, correct, count in points if count]
    return line_chart({**series, "perfect calibration": [(0.0, 0.0), (1.0, 1.0)]}, "score", "share correct", 1.0)


def score_histogram(details: Details) -> Figure:
    """Number of predictions in each tenth of the scores."""
    counts = details["calibration"]["count"]
    return bar_chart([(f"{place / 10:.1f} to {place / 10 + 0.1:.1f}", count) for place, count in enumerate(counts)])


def error_costs(details: Details) -> Figure:
    """The cost of each error type in points of AP50."""
    return bar_chart([(name, 100 * error["cost"]) for name, error in details["errors"].items()], "{:.1f}")


def confusion_chart(details: Details) -> Figure:
    """Confusion matrix with the background as its last class; with many classes, the 20 most frequent confusions."""
    names = [row["name"] for row in details["classes"]]
    if len(names) > MATRIX_CLASSES:
        pairs = [
            (count, true, predicted)
            for true, predicted, count in details["confusion"]
            if true != predicted and min(true, predicted) >= 0
        ]
        most = sorted(pairs)[:-21:-1]
        return bar_chart([((names[true], f"> {names[predicted]}"), count) for count, true, predicted in most])
    size = len(names) + 1
    counts = [[0] * size for _ in range(size)]
    for true, predicted, count in details["confusion"]:
        counts[true][predicted] = count  # -1, the background, is the last row and column
    return matrix_chart(counts, [*names, "background"], "predicted", "ground truth")


def confusion_caption(details: Details) -> str:
    """How to read the chart of `confusion_chart`."""
    if len(details["classes"]) > MATRIX_CLASSES:
        return "Ground truth > prediction, the most frequent confusions of two classes."
    return "A cell is darker where it holds a larger share of its row."


def write_plots(details: Details, folder: Path) -> Sequence[Path]:
    """Write the charts of one evaluation into a folder as PNG; return their paths."""
    figures = {
        "precision_recall.png": precision_recall({"": details}),
        "classes_precision_recall.png": class_precision_recall(details),
        "confusion.png": confusion_chart(details),
        "calibration.png": reliability({"this model": details}),
        "errors.png": error_costs(details),
    }
    return [save_png(figure, folder / name) for name, figure in figures.items()]
