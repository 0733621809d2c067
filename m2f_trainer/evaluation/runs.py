"""What a run's folder tells about the run: recipe, course, figures, details. For reports and cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from m2f_trainer.data.hub import load_dataset
from m2f_trainer.data.hub_streams import load_stream
from m2f_trainer.errors import DataError, ModelFolderError
from m2f_trainer.evaluation.curves import EVALUATION

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


def rows_of_run(run: Run) -> Dataset | None:
    """The valid split that the run was scored on; None where its dataset can't be had here."""
    name = run.recipe.get("dataset_name")
    if not name:
        return None
    try:
        splits = load_stream(str(name))[1] if run.recipe.get("streaming") else load_dataset(str(name))
        return splits.get("valid")
    except (DataError, OSError):
        return None
