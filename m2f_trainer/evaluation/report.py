"""`m2f report`: one self-contained page about a run, or comparing several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2f_trainer.config.recipe import model_fields
from m2f_trainer.data.dataset import Category
from m2f_trainer.data.images import open_image
from m2f_trainer.errors import ImageError
from m2f_trainer.evaluation import plots
from m2f_trainer.evaluation.coco import percent
from m2f_trainer.evaluation.gallery import pictures, rows_of_run
from m2f_trainer.run_folder import PICTURES, Run, blame_damage, evaluated_folder, load_runs, write_atomically
from m2f_trainer.viz.charts import line_chart
from m2f_trainer.viz.html import Chart, Photo, Table, chart, photo, render_page

SUMMARY = {
    "eval_map": "AP", "eval_map_50": "AP50", "eval_map_75": "AP75", "eval_map_small": "small",
    "eval_map_medium": "medium", "eval_map_large": "large", "eval_mar_100": "AR100", "eval_box_map": "box AP",
    "eval_boundary_map": "boundary AP", "eval_unlimited_map": "AP, no limit", "test_map": "test AP",
}  # fmt: skip
LOGGED = {
    "eval_map": "Mask AP", "eval_map_50": "Mask AP50", "eval_boundary_map": "Boundary AP", "loss": "Training loss",
    "learning_rate": "Learning rate", "data_wait": "Share of time spent waiting for data",
}  # fmt: skip


def write_report(folders: Sequence[Path], output: Path, load_images: bool = False) -> Path:
    """Write the page about these runs; return its path.

    Its pictures are those in the runs' folders. With `load_images`, more of them are drawn from the datasets that the
    runs' recipes name, so only for recipes that the user trusts: they may name any dataset of this machine or the Hub.

    Raises:
        ModelFolderError: a folder has no evaluation, or a file in it is damaged.
    """
    with blame_damage(", ".join(map(str, folders))):
        return write_atomically(output, _page(load_runs(folders), load_images))


def _page(runs: Sequence[Run], load_images: bool) -> str:
    heading = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"
    details = {run.name: run.details for run in runs}
    trained = [run for run in runs if run.recipe]
    return render_page(
        "report.html",
        script="sort.js",
        title=f"m2f report: {heading}",
        heading=heading,
        summary=_runs_table(runs),
        dense=any("eval_unlimited_map" in run.figures for run in runs),
        settings=Table(["run", "backbone", "tuned", "input", "dataset"], [_settings(run) for run in trained]),
        differences=_differences(trained),
        training=list(_training_charts(runs)),
        classes=_classes(runs[0].details) if len(runs) == 1 else _classes_compared(runs),
        score_charts=list(_score_charts(details)),
        errors=_errors(details),
        confusion=[
            chart(f"Confusion, {name}", plots.confusion_chart(one), plots.confusion_caption(one))
            for name, one in details.items()
        ],
        galleries=[_gallery(run, 6 if len(runs) == 1 else 3, load_images) for run in runs],
    )


def _runs_table(runs: Sequence[Run]) -> Table:
    """The figures of each run, without columns that no run has.

    The columns on what was evaluated are left out where all rows are runs with the same values.
    """
    shown = [key for key in SUMMARY if any(key in run.figures for run in runs)]
    evaluated = [_evaluated(run) for run in runs]
    scores = any("evaluated" in run.details for run in runs)
    sources = [key for key in evaluated[0] if scores or len({one[key] for one in evaluated}) > 1]
    rows: list[list[object]] = []
    for run, source in zip(runs, evaluated, strict=True):
        figures = (percent(run.figures.get(key)) for key in shown)
        rows.append([run.name, *(source[key] for key in sources), *figures, run.figures.get("step", "-")])
    return Table(["run", *sources, *(SUMMARY[key] for key in shown), "step"], rows)


def _evaluated(run: Run) -> dict[str, str]:
    """What the figures are of; "-" for the model of a run, which is its own, and for what the files don't tell."""
    told = {"dataset": run.recipe.get("dataset_name"), "split": "valid"} if run.recipe else {}
    told = run.details.get("evaluated", told)
    return {
        "model": _value(told.get("model")),
        "dataset": _dataset(told.get("dataset")),
        "split": _value(told.get("split")),
        "images": str(len(run.details["images"])),
    }


def _settings(run: Run) -> list[str]:
    recipe = run.recipe
    size = f"{recipe['image_width']}x{recipe['image_height']}" if "image_width" in recipe else "-"
    backbone = str(recipe.get("backbone") or "-")
    if Path(backbone).is_absolute():
        backbone = Path(backbone).name
    if config := recipe.get("backbone_config"):  # a randomly initialised backbone of this configuration, instead
        architecture = config.get("model_type", "backbone") if isinstance(config, Mapping) else "backbone"
        backbone = f"{architecture}, randomly initialised"
    return [run.name, backbone, str(recipe.get("tune", "-")), size, _dataset(recipe.get("dataset_name"))]


def _dataset(name: object) -> str:
    """The last part of a dataset's path or Hub id; "-" if there is none."""
    return str(name or "-").rstrip("/").rsplit("/", 1)[-1]


def _differences(runs: Sequence[Run]) -> Table:
    """The fields that affect the model and whose values differ between the runs, which may be none."""
    given = [model_fields(run.recipe) for run in runs]
    names = dict.fromkeys(name for one in given for name in one)
    rows = [
        [name, *(_value(one.get(name)) for one in given)]
        for name in names
        if any(one.get(name) != given[0].get(name) for one in given)
    ]
    return Table(["setting", *(run.name for run in runs)], rows)


def _value(value: object) -> str:
    """A recipe's value as in JSON; folders without their parents, and "-" for a field that is not set."""
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    return "-" if value is None else json.dumps(value)


def _training_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """A chart of each logged figure; values that are -1 (nothing to score), NaN or infinite are left out."""
    for key, title in LOGGED.items():
        scale = 100 if key.startswith("eval_") else 1  # percent, as in the tables
        points = [[(x, scale * y) for x, y in run.curves.get(key, []) if 0 <= y < math.inf] for run in runs]
        names = [run.name for run in runs] if len(runs) > 1 else [""]
        series = {name: curve for name, curve in zip(names, points, strict=True) if curve}
        if series:
            yield chart(title, line_chart(series, "step"))


def _classes(details: Mapping[str, Any]) -> Table:
    head = ("class", "objects", "AP", "AP50", "AP75", "boundary AP", "best threshold", "precision", "recall", "F1")
    rows = [
        [
            row["name"], row["objects"], percent(row["ap"]), percent(row["ap50"]), percent(row["ap75"]),
            percent(details["figures"].get(f"boundary_map_class/{row['name']}")),
            f"{row['threshold']:.2f}" if row["kept"] else "-",
            *(percent(row[key] if row["objects"] else None) for key in ("precision", "recall", "f1")),
        ]
        for row in sorted(details["classes"], key=lambda row: -row["ap"])
    ]  # fmt: skip
    return Table(head, rows, sortable=True)


def _classes_compared(runs: Sequence[Run]) -> Table:
    """AP of each class and run, and its objects: in one column if all runs were scored on as many."""
    tables = [{row["name"]: row for row in run.details["classes"]} for run in runs]
    names = dict.fromkeys(name for one in tables for name in one)
    objects = {name: [one[name]["objects"] for one in tables if name in one] for name in names}
    if all(len(set(counts)) == 1 for counts in objects.values()):
        heads = ["objects"]
    else:
        heads = [f"objects, {run.name}" for run in runs]
        objects = {name: [one[name]["objects"] if name in one else "-" for one in tables] for name in names}
    rows = [
        [name, *objects[name][: len(heads)], *(percent(one[name]["ap"] if name in one else None) for one in tables)]
        for name in names
    ]
    return Table(["class", *heads, *(f"AP, {run.name}" for run in runs)], rows, sortable=True)


def _score_charts(details: Mapping[str, Mapping[str, Any]]) -> Iterator[Chart]:
    several = len(details) > 1
    title = "Precision over recall" + ", IoU 0.5" * several
    yield chart(title, plots.precision_recall(details), "Mean of the classes.")
    if not several:
        (one,) = details.values()
        title = "Precision over recall, IoU 0.5, classes with the most objects"
        yield chart(title, plots.class_precision_recall(one))
        yield chart("Predictions by score", plots.score_histogram(one))
    errors = ", ".join(f"{name} {one['calibration']['error']:.3f}" for name, one in details.items())
    title = "Share of correct predictions over score"
    yield chart(title, plots.reliability(details), f"Expected calibration error: {errors}")


def _errors(details: Mapping[str, Mapping[str, Any]]) -> Table:
    errors = {name: one["errors"] for name, one in details.items()}
    head = ["error", *(cell for name in errors for cell in (f"{name}: count", f"{name}: cost"))]
    rows = [
        [kind, *(cell for one in errors.values() for cell in (one[kind]["count"], f"{100 * one[kind]['cost']:.1f}"))]
        for kind in next(iter(errors.values()))
    ]
    return Table(head, rows)


NO_PICTURES = "the run's folder has none of this evaluation. m2f report --images draws them from the dataset."
NO_PICTURES_OF_SCORES = "the folder has none. m2f evaluate --output_dir writes them."


@dataclass(frozen=True)
class Gallery:
    """The worst and the best images of a run; where there are none, `problem` says why."""

    run: str
    photos: Mapping[str, Sequence[Photo]] = field(default_factory=dict)
    problem: str = ""


def _gallery(run: Run, count: int, load_images: bool) -> Gallery:
    """The pictures in the run's folder, or at most `count` of the worst and of the best images of its dataset.

    A folder of `m2f evaluate` has no recipe, which would say how its dataset is read.
    """
    return _drawn_gallery(run, count) if load_images and run.recipe else _stored_gallery(run)


def _stored_gallery(run: Run) -> Gallery:
    """The pictures of the worst and best images in a run's folder, which a finished run has for its model card.

    If the run was resumed since and is not finished, they are of an earlier evaluation, and not shown.
    """
    photos: dict[str, list[Photo]] = {}
    for kind in ("worst", "best") if evaluated_folder(run.folder) == run.folder else ():
        for number, entry in enumerate(run.details["shown"][kind], 1):
            path = run.folder / PICTURES / f"{kind}_{number}.jpg"
            if path.is_file() and not path.is_symlink():
                try:
                    image = open_image(path, str(path))
                except ImageError as error:
                    return Gallery(run.name, problem=str(error))
                photos.setdefault(kind, []).append(photo(image, path.name, (f"{kind} {number}", _quality(entry))))
    if not photos:
        return Gallery(run.name, problem=NO_PICTURES if run.recipe else NO_PICTURES_OF_SCORES)
    return Gallery(run.name, photos)


def _drawn_gallery(run: Run, count: int) -> Gallery:
    """At most `count` of the worst and `count` of the best images, ground truth on the left."""
    rows = rows_of_run(run)
    if rows is None:
        name = run.recipe.get("dataset_name")
        problem = f"the dataset {name} is not on this machine." if name else "the run's recipe names no dataset."
        return Gallery(run.name, problem=problem)
    categories = [Category(row["id"], row["name"]) for row in run.details["classes"]]
    try:
        photos = {
            kind: [
                photo(image, name, (name, _quality(entry)))
                for name, image, entry in pictures(rows, run.details["shown"][kind][:count], categories)
            ]
            for kind in ("worst", "best")
        }
    except ImageError as error:
        return Gallery(run.name, problem=str(error))
    return Gallery(run.name, photos)


def _quality(entry: Mapping[str, Any]) -> str:
    found, wrong, missed = entry["found"], entry["wrong"], entry["missed"]
    return f"quality {entry['quality']:.2f}: {found} found, {wrong} wrong, {missed} missed"
