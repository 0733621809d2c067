"""The charts of assessments, each for one run or several: for reports, and as PNG beside evaluation.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2f_trainer.viz.charts import Drawing, bars, lines, save_png, squares

MOST_CLASSES = 12  # a confusion matrix of more is told by its largest confusions
RECALLS = [place / 100 for place in range(101)]

Details = Mapping[str, Any]


def precision_recall(given: Mapping[str, Details]) -> Drawing:
    """Precision over recall, the classes' mean: of one run at three IoUs, of several at IoU 0.5."""
    series = {}
    for name, details in given.items():
        curves = details["precision_recall"]["mean"]
        for iou in curves if len(given) == 1 else ("0.5",):
            label = f"IoU {iou}" if len(given) == 1 else name
            series[label] = list(zip(RECALLS, curves[iou], strict=False))
    return lines(series, "recall", 1.0)


def class_curves(details: Details) -> Drawing:
    """Precision over recall at IoU 0.5 of the classes with the most objects."""
    ranked = sorted(range(len(details["classes"])), key=lambda index: -details["classes"][index]["objects"])
    curves = {details["classes"][index]["name"]: details["precision_recall"]["classes"][index] for index in ranked[:6]}
    return lines({name: list(zip(RECALLS, curve, strict=True)) for name, curve in curves.items() if curve}, "recall", 1)


def reliability(given: Mapping[str, Details]) -> Drawing:
    """Share of right predictions over their mean score; the diagonal is a score that can be trusted."""
    series = {}
    for name, details in given.items():
        told = details["calibration"]
        series[name] = [
            (x, y) for x, y, count in zip(told["score"], told["correct"], told["count"], strict=True) if count
        ]
    return lines({**series, "a score to be trusted": [(0.0, 0.0), (1.0, 1.0)]}, "score", 1.0)


def score_counts(details: Details) -> Drawing:
    """How many predictions have which score."""
    counts = details["calibration"]["count"]
    return bars([(f"{place / 10:.1f} to {place / 10 + 0.1:.1f}", count) for place, count in enumerate(counts)])


def error_costs(details: Details) -> Drawing:
    """AP50 points that each kind of error costs."""
    return bars([(name, round(100 * one["cost"], 2)) for name, one in details["errors"].items()], "{:.1f}")


def confusion(details: Details) -> Drawing:
    """Rows are what is there, columns what was said; the last of each is the background.

    With many classes, the commonest confusions of two classes as bars.
    """
    names = [row["name"] for row in details["classes"]]
    if len(names) > MOST_CLASSES:
        wrong = [
            (count, true, said) for true, said, count in details["confusion"] if true != said and min(true, said) >= 0
        ]
        return bars(
            [(f"{names[true][:7]} > {names[said][:7]}", count) for count, true, said in sorted(wrong)[::-1][:20]]
        )
    size = len(names) + 1
    counts = [[0] * size for _ in range(size)]
    for true, said, count in details["confusion"]:
        counts[true][said] = count  # -1, the background, is the last
    labels = [*names, "background"]
    return squares(counts, labels, labels)


def confusion_key(details: Details) -> str:
    """What the chart's rows and columns are."""
    names = [row["name"] for row in details["classes"]]
    if len(names) > MOST_CLASSES:
        return "what is there > what was said, the commonest"
    listed = ", ".join(f"{number} {name}" for number, name in enumerate([*names, "background"], 1))
    return f"Rows: what is there. Columns: what was said. {listed}"


def every_plot(details: Details) -> Iterator[tuple[str, Drawing]]:
    """(file name, chart) of one assessment."""
    yield "precision_recall.png", precision_recall({"": details})
    yield "classes_precision_recall.png", class_curves(details)
    yield "confusion.png", confusion(details)
    yield "calibration.png", reliability({"this model": details})
    yield "errors.png", error_costs(details)


def write_plots(details: Details, folder: Path) -> Sequence[Path]:
    """Write all of them into a folder."""
    return [save_png(drawing, folder / name) for name, drawing in every_plot(details)]
