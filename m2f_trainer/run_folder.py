"""Figures for people and for programs: a table for the console, a JSON file beside the checkpoint."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f_trainer.errors import ModelFolderError

EVALUATION, CLASSES = "evaluation.json", "classes.csv"
FORMULA = tuple("=+-@\t\r")


def write_metrics(metrics: Mapping[str, float], path: str | Path) -> Path:
    """Write the metrics as JSON, every digit kept, whole or not at all; returns the path."""
    return _write_whole(Path(path), json.dumps(dict(metrics), indent=2, sort_keys=True) + "\n")


def _write_whole(target: Path, text: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(target)
    return target


def read_metrics(path: str | Path) -> dict[str, float]:
    """The inverse of `write_metrics`."""
    metrics: dict[str, float] = json.loads(Path(path).read_text(encoding="utf-8"))
    return metrics


def write_details(details: Mapping[str, Any], path: str | Path) -> Path | None:
    """Write an assessment's details as JSON, one line a part; None where a scorer of one's own left none."""
    if not details:
        return None
    parts = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in details.items())
    return _write_whole(Path(path), f"{{\n{parts}\n}}\n")


def read_details(folder: str | Path) -> dict[str, Any]:
    """The details in a folder's evaluation.json; none where it has no such file."""
    path = Path(folder, EVALUATION)
    details: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return details


def write_classes(details: Mapping[str, Any], path: str | Path) -> Path | None:
    """Write the classes' table as CSV. A name that a spreadsheet would take for a formula gets an apostrophe."""
    rows = details.get("classes")
    if not rows:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        name = row["name"]
        writer.writerow({**row, "name": f"'{name}" if name[:1] in FORMULA else name})
    return _write_whole(Path(path), text.getvalue())


Course = dict[str, list[tuple[float, float]]]

_REMEDY = "Copy the folder again, or take another checkpoint."


@dataclass(frozen=True)
class Run:
    """A run, one of its checkpoints, or what `m2f evaluate --output_dir` wrote.

    Attributes:
        name: tells it from the others of a report.
        figures: metrics.json.
        details: evaluation.json.
        recipe: recipe.json, flat.
        course: figure -> (step, value) at each log or evaluation, by step.
    """

    name: str
    folder: Path
    figures: Mapping[str, Any]
    details: Mapping[str, Any]
    recipe: Mapping[str, Any]
    course: Course


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read what there is; of a run that isn't finished, its newest checkpoint. Raises ModelFolderError."""
    source = folder if (folder / EVALUATION).is_file() else newest_checkpoint(folder)
    details = read_json(source / EVALUATION) if source else {}
    if source is None or not details:
        raise ModelFolderError(
            f"{folder}: expected {EVALUATION} in it or in one of its checkpoints, found none. Give the folder of a run "
            "of this version, or write one with m2f evaluate MODEL DATASET --output_dir FOLDER."
        )
    state = read_json(source / "trainer_state.json")
    figures, recipe = read_json(source / "metrics.json"), read_json(source / "recipe.json")
    return Run(name or folder.resolve().name, folder, figures, details, recipe, course_of(state))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last step that has been evaluated."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{EVALUATION}")]
    steps = {int(match[1]): path for path in found if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return steps[max(steps)] if steps else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing. Raises ModelFolderError where it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path}: can't be read as JSON ({error}). {_REMEDY}") from error
    if not isinstance(values, dict):
        raise ModelFolderError(f"{path}: expected a JSON object, got a {type(values).__name__}. {_REMEDY}")
    return values


def course_of(state: Mapping[str, Any]) -> Course:
    """Every number of the Trainer's log history, by name; of a step told twice, the last telling."""
    told: dict[str, dict[float, float]] = {}
    for entry in state.get("log_history", []):
        for key, value in entry.items():
            if key not in ("step", "epoch") and isinstance(value, int | float):
                told.setdefault(key, {})[entry["step"]] = value
    return {key: sorted(points.items()) for key, points in told.items()}


def named(folders: list[Path]) -> list[Run]:
    """Runs under names that differ: a folder's own name, or as much of its path as it takes. Raises as `read_run`."""
    parts = [folder.resolve().parts for folder in folders]
    names = [path[-1] for path in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(path[-length:]) for path in parts]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never there in part; of a file name that is no UTF-8, the odd bytes are escaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    unfinished.replace(path)


ADAPTER_FOLDER, PREDICTIONS = "adapter", "predictions.json"


METRICS, RECIPE, MANIFEST, STATE = "metrics.json", "recipe.json", "manifest.json", "trainer_state.json"
FINGERPRINT, PICKLED_ARGUMENTS = "fingerprint.json", "training_args.bin"
STAGING = ".staging"
