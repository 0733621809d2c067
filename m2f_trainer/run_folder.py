"""The files of a run: their names, their readers, and the one atomic writer.

runs/first/                 output_dir of `m2f train`
  recipe.json               the resolved recipe, itself a recipe
  model.safetensors, config.json, preprocessor_config.json
                            the final model, for from_pretrained
  metrics.json              its metrics on the validation split, and on the test split if there is one
  evaluation.json           diagnostics of its validation: classes, errors, curves, examples; read by m2f report
  trainer_state.json        the Trainer's log history
  fingerprint.json          settings that affect results, compared on resume
  README.md, pictures/      the model card
  adapter/                  of a LoRA run: the adapter with neck and head
  feature_cache/            with feature_cache: backbone features, deleted at the end
  *.py                      the model's code, for trust_remote_code
  runs/                     TensorBoard's files
  checkpoint-N/             model, records and code at step N, plus the states of optimizer, schedule and random
                            numbers, and manifest.json, which lists the files with sizes and SHA-256 and makes the
                            checkpoint complete
  .staging/                 the checkpoint being written
  .resume/                  links to the checkpoint that a changed run resumed from
  .lock                     held by the process that writes here

scores/                     --output_dir of `m2f evaluate`
  metrics.json, evaluation.json, classes.csv, predictions.json and charts
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EISDIR
from pathlib import Path
from typing import Any

from m2f_trainer.errors import ModelFolderError, escape_controls, missing_path

RECIPE, METRICS, EVALUATION, STATE = "recipe.json", "metrics.json", "evaluation.json", "trainer_state.json"
FINGERPRINT, MANIFEST, PICKLED_ARGUMENTS = "fingerprint.json", "manifest.json", "training_args.bin"
CLASSES, PREDICTIONS = "classes.csv", "predictions.json"
ADAPTER_FOLDER, FEATURE_CACHE = "adapter", "feature_cache"
PICTURES = "pictures"
"""The folder of a card's pictures. They show the dataset, so they are uploaded only on request."""

STAGING, RESUME_STAGING, LOCK = ".staging", ".resume", ".lock"

WRITTEN_FOLDERS = {ADAPTER_FOLDER, FEATURE_CACHE, PICTURES, STAGING, RESUME_STAGING, "runs"}
"""The folders inside of a run's folder that files are written into; transformers writes TensorBoard's into `runs`."""

FORMULA_STARTS = tuple("=+-@\t\r")
"""First characters that make a spreadsheet take a cell for a formula."""

REMEDY = "Copy the folder again, or take another checkpoint."

Curves = dict[str, list[tuple[float, float]]]
"""Name of a logged value -> (step, value) pairs, sorted by step."""


def check_no_links(folder: str | Path) -> None:
    """Check that a folder that files are written into holds no link that one of them would be written through.

    Libraries such as transformers open files by name and follow links. A received folder may hold a link named
    `config.json` that leads to a file of the user. Two kinds of links are allowed: `checkpoint-N`, which is only read,
    and links to folders that nothing is written into, such as a dataset on another disk.

    Raises:
        ModelFolderError: there is one, in the folder itself or in those of the adapter and the pictures.
    """
    folder = Path(folder)
    places = [folder, *(folder / name for name in (ADAPTER_FOLDER, PICTURES))]
    for path in (path for place in places if place.is_dir() for path in sorted(place.iterdir())):
        only_read = path.name.startswith("checkpoint-") or (path.is_dir() and path.name.lower() not in WRITTEN_FOLDERS)
        if path.is_symlink() and not only_read:
            raise ModelFolderError(
                f"{path} is a link to {path.readlink()}, and nothing is written through links. Remove it, or give "
                "another output folder."
            )


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that a reader finds the old file or the complete new one; return its path.

    The content goes to a new file beside it, which then replaces it; no link is followed. Missing folders are created.
    Bytes of a file name that is not UTF-8 (surrogates in Python) are escaped. After an error nothing is left.

    Raises:
        OSError: the file can't be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)  # of a killed process with the same id
    try:
        with unfinished.open("xb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, values: Mapping[str, Any]) -> Path:
    """Write a JSON object atomically, indented; return its path."""
    return write_atomically(path, json.dumps(values, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file. Raises ModelFolderError if the file is damaged."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path}: can't be read as JSON ({error}). {REMEDY}") from error
    if not isinstance(values, dict):
        raise ModelFolderError(f"{path}: expected a JSON object, got a {type(values).__name__}. {REMEDY}")
    return values


@contextmanager
def blame_damage(folder: str | Path) -> Iterator[None]:
    """Turn errors caused by wrong types or missing keys in a run's files into an error that names its folder.

    Raises:
        ModelFolderError: instead of that error.
    """
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ModelFolderError(
            f"{folder}: a value in its files is missing or of a wrong type ({type(error).__name__}: {error}). {REMEDY}"
        ) from error


def write_metrics(metrics: Mapping[str, float], path: str | Path) -> Path:
    """Write metrics as JSON, sorted by name, with every digit; return the path."""
    return write_json(path, dict(sorted(metrics.items())))


def read_metrics(path: str | Path) -> dict[str, float]:
    """The inverse of `write_metrics`. Raises OSError if there is no such file."""
    metrics: dict[str, float] = json.loads(Path(path).read_text(encoding="utf-8"))
    return metrics


def write_details(details: Mapping[str, Any], path: str | Path) -> Path | None:
    """Write the details of an evaluation as JSON, one line per part; return None if there are none."""
    if not details:
        return None
    parts = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in details.items())
    return write_atomically(path, f"{{\n{parts}\n}}\n")


def read_details(folder: str | Path) -> dict[str, Any]:
    """The details in a folder's evaluation.json; empty if there is no such file."""
    return read_json(Path(folder, EVALUATION))


def write_classes(details: Mapping[str, Any], path: str | Path) -> Path | None:
    """Write the table of classes as CSV; return None if there is none."""
    rows = details.get("classes")
    if not rows:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "name": csv_text(row["name"])} for row in rows)
    return write_atomically(path, text.getvalue())


def csv_text(text: str) -> str:
    """Text for a cell of a CSV file, with an apostrophe before what a spreadsheet would run as a formula.

    Control characters, which a terminal would obey, are written as escapes.
    """
    return escape_controls(f"'{text}" if text.startswith(FORMULA_STARTS) else text)


@dataclass(frozen=True)
class Run:
    """A run, one of its checkpoints, or the output of `m2f evaluate --output_dir`.

    Attributes:
        name: unique among the runs of a report.
        folder: where it was read from.
        figures: the content of metrics.json.
        details: the content of evaluation.json.
        recipe: the content of recipe.json.
        curves: every logged value over the steps.
    """

    name: str
    folder: Path
    figures: Mapping[str, Any]
    details: Mapping[str, Any]
    recipe: Mapping[str, Any]
    curves: Curves


def final_files(folder: Path) -> list[Path]:
    """The files and folders of the final model in a run's folder, with its figures and card."""
    records = (RECIPE, METRICS, EVALUATION, STATE, FINGERPRINT, ADAPTER_FOLDER, PICTURES)
    model = ("config.json", "preprocessor_config.json", "README.md")
    found = [*(folder / name for name in (*records, *model)), *folder.glob("model*.safetensors*")]
    return [path for path in found if path.exists()]


def load_run(folder: Path, name: str | None = None) -> Run:
    """Read a run; of an unfinished one, or one that was resumed since, its newest evaluated checkpoint.

    Raises:
        ModelFolderError: neither the folder nor a checkpoint in it holds an evaluation, or a file is damaged.
    """
    if problem := missing_path(folder):
        raise ModelFolderError(f"{problem} Give the folder of a run.")
    source = evaluated_folder(folder)
    details = read_json(source / EVALUATION) if source else {}
    if source is None or not details:
        raise ModelFolderError(
            f"{folder}: expected {EVALUATION} in it or in one of its checkpoints, found none. Give the folder of a run "
            "trained with this version, or create one with m2f evaluate MODEL DATASET --output_dir FOLDER."
        )
    curves = curves_of(read_json(source / STATE))
    name = name or folder.resolve().name
    return Run(name, folder, read_json(source / METRICS), details, read_json(source / RECIPE), curves)


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, a repeated one once; each is named by as many last parts of its path as make all differ."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    parts = [folder.resolve().parts for folder in folders]
    names = [path[-1] for path in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(path[-length:]) for path in parts]
    return [load_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def evaluated_folder(folder: Path) -> Path | None:
    """The folder itself if it holds the last evaluation, otherwise its newest evaluated checkpoint, or None."""
    newest = newest_evaluated_checkpoint(folder)
    if not (folder / EVALUATION).is_file():
        return newest
    if newest is None:
        return folder
    own, newer = (read_json(one / STATE).get("global_step", 0) for one in (folder, newest))
    return newest if newer > own else folder


def newest_evaluated_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step among those with an evaluation; None if there is none."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{EVALUATION}")]
    steps = {int(match[1]): path for path in found if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return steps[max(steps)] if steps else None


def curves_of(state: Mapping[str, Any]) -> Curves:
    """Every number in the log history of a trainer_state.json; of a step logged twice, the last value."""
    values: dict[str, dict[float, float]] = {}
    for entry in state.get("log_history", []):
        for key, value in entry.items():
            if key not in ("step", "epoch") and isinstance(value, int | float):
                values.setdefault(key, {})[entry["step"]] = value
    return {key: sorted(points.items()) for key, points in values.items()}
