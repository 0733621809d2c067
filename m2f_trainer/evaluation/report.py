"""`m2f report`: one page about a run, or about several beside one another, that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2f_trainer.data.dataset import Category
from m2f_trainer.errors import ImageError
from m2f_trainer.evaluation import plots
from m2f_trainer.evaluation.gallery import pictures, rows_of_run
from m2f_trainer.run_folder import Run, read_runs
from m2f_trainer.viz.charts import lines
from m2f_trainer.viz.html import SORT, chart, grid, page, photograph, table, write_page

SUMMARY = {
    "eval_map": "AP", "eval_map_50": "AP50", "eval_map_75": "AP75", "eval_map_small": "small",
    "eval_map_medium": "medium", "eval_map_large": "large", "eval_mar_100": "AR100", "eval_box_map": "box AP",
    "eval_boundary_map": "boundary AP", "test_map": "test AP",
}  # fmt: skip
COURSES = {
    "eval_map": "Mask AP", "eval_map_50": "Mask AP50", "eval_boundary_map": "Boundary AP", "loss": "Training loss",
    "learning_rate": "Learning rate", "data_wait": "Share of time spent waiting for data",
}  # fmt: skip


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write the page about these runs; returns its path. Raises ModelFolderError where a folder holds no evaluation."""
    runs = read_runs(folders)
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"
    return write_page(output, page(f"m2f report: {title}", list(_parts(title, runs)), SORT))


def _parts(title: str, runs: Sequence[Run]) -> Iterator[str]:
    given = {run.name: run.details for run in runs}
    yield f"<h1>{html.escape(title)}</h1>"
    yield "<p>COCO figures in percent, at the images' original size, against the untouched annotations.</p>"
    yield _summary(runs)
    yield "<h2>Course</h2>" + grid(list(_courses(runs)))
    yield "<h2>Classes</h2>" + (_classes(runs[0].details) if len(runs) == 1 else _classes_compared(runs))
    yield "<h2>Precision, recall and scores</h2>" + grid(list(_score_charts(given)))
    yield "<h2>Errors</h2>"
    yield "<p>At IoU 0.5, as TIDE counts them. Its cost is the AP50, in points, to be had by mending it alone.</p>"
    yield _errors(given)
    yield grid(
        [chart(f"Confusion, {name}", plots.confusion(one), plots.confusion_key(one)) for name, one in given.items()]
    )
    for run in runs:
        yield from _photographs(run, 6 if len(runs) == 1 else 3)


def percent(value: float | None) -> str:
    """A share as percent; "-" where it was not scored."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def _summary(runs: Sequence[Run]) -> str:
    rows = [
        [run.name, *(percent(run.figures.get(key)) for key in SUMMARY), run.figures.get("step", "-"), *_setting(run)]
        for run in runs
    ]
    return table(["run", *SUMMARY.values(), "step", "backbone", "tuned", "input", "dataset"], rows)


def _setting(run: Run) -> list[str]:
    recipe = run.recipe
    size = f"{recipe['image_width']}x{recipe['image_height']}" if "image_width" in recipe else "-"
    dataset = str(recipe.get("dataset_name") or "-").rstrip("/").rsplit("/", 1)[-1]
    backbone = str(recipe.get("backbone") or "-")
    if Path(backbone).is_absolute():
        backbone = Path(backbone).name
    return [backbone, str(recipe.get("tune", "-")), size, dataset]


def _courses(runs: Sequence[Run]) -> Iterator[str]:
    """A chart of each figure that was told; -1, a figure without truth, and what is no number are left out."""
    for key, title in COURSES.items():
        unit = 100 if key.startswith("eval_") else 1  # percent, as in the tables
        told = {run.name: [(x, unit * y) for x, y in run.curves.get(key, []) if 0 <= y < math.inf] for run in runs}
        series = {name: curve for name, curve in told.items() if curve}
        if series:
            yield chart(title, lines(series, "step"))


def _classes(details: Mapping[str, Any]) -> str:
    head = ("class", "objects", "AP", "AP50", "AP75", "boundary AP", "best threshold", "precision", "recall", "F1")
    rows = [
        [
            row["name"], row["objects"], percent(row["ap"]), percent(row["ap50"]), percent(row["ap75"]),
            percent(details["figures"].get(f"boundary_map_class/{row['name']}")),
            f"{row['threshold']:.2f}" if row["kept"] else "-",
            percent(row["precision"]), percent(row["recall"]), percent(row["f1"]),
        ]
        for row in sorted(details["classes"], key=lambda row: -row["ap"])
    ]  # fmt: skip
    return table(head, rows, sortable=True)


def _classes_compared(runs: Sequence[Run]) -> str:
    tables = [{row["name"]: row for row in run.details["classes"]} for run in runs]
    names = dict.fromkeys(name for one in tables for name in one)
    rows = [
        [name, max(one[name]["objects"] for one in tables if name in one)]
        + [percent(one[name]["ap"] if name in one else None) for one in tables]
        for name in names
    ]
    return table(["class", "objects", *(f"AP, {run.name}" for run in runs)], rows, sortable=True)


def _score_charts(given: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    several = len(given) > 1
    yield chart("Precision over recall" + ", IoU 0.5" * several, plots.precision_recall(given), "Mean of the classes.")
    if not several:
        (details,) = given.values()
        yield chart("Precision over recall, IoU 0.5, classes with the most objects", plots.class_curves(details))
        yield chart("Predictions by score", plots.score_counts(details))
    told = ", ".join(f"{name} {one['calibration']['error']:.3f}" for name, one in given.items())
    yield chart(
        "Share of right predictions over score", plots.reliability(given), f"Expected calibration error: {told}"
    )


def _errors(given: Mapping[str, Mapping[str, Any]]) -> str:
    kinds = list(next(iter(given.values()))["errors"])
    rows = [[kind, *(cell for one in given.values() for cell in _error_cells(one["errors"][kind]))] for kind in kinds]
    head = ["error", *(cell for name in given for cell in (f"{name}: how many", f"{name}: cost"))]
    return table(head, rows)


def _error_cells(error: Mapping[str, float]) -> tuple[str, str]:
    return str(error["count"]), f"{100 * error['cost']:.1f}"


def _photographs(run: Run, most: int) -> Iterator[str]:
    """The worst and the best images, truth on the left; a sentence where the dataset isn't here."""
    yield f"<h2>Images of {html.escape(run.name)}: truth on the left, prediction on the right</h2>"
    rows = rows_of_run(run)
    if rows is None:
        name = run.recipe.get("dataset_name")
        why = f"the dataset {name} is not here" if name else "the folder doesn't say which dataset it is about"
        yield f"<p>No pictures: {html.escape(why)}.</p>"
        return
    categories = [Category(row["id"], row["name"]) for row in run.details["classes"]]
    for kind in ("worst", "best"):
        try:
            made = pictures(rows, run.details["shown"][kind][:most], categories)
        except ImageError as error:
            yield f"<p>No pictures: {html.escape(str(error))}</p>"
            return
        yield f"<h3>The {kind}</h3>" if made else ""
        yield grid([photograph(image, name, (name, _told(one))) for name, image, one in made], wide=True)


def _told(one: Mapping[str, Any]) -> str:
    return f"quality {one['quality']:.2f}: {one['found']} found, {one['wrong']} wrong, {one['missed']} missed"
