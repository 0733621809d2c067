"""Figures for people and for programs: a table for the console, a JSON file beside the checkpoint."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2f_trainer.data.entries import printable

COLUMNS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
TITLES = ("AP", "AP50", "AP75", "small", "medium", "large", "AR100")
CLASS_KEY = "map_class/"
EVALUATION, CLASSES = "evaluation.json", "classes.csv"
FORMULA = tuple("=+-@\t\r")


def metrics_table(metrics: Mapping[str, float], prefix: str = "") -> str:
    """The COCO figures in percent, of masks, boxes and boundaries, and then the mask AP of every class, best first.

    "-" stands for a figure without any truth (-1 in the metrics).

    Args:
        metrics: what `CocoMap` returns, its keys with `prefix` before them ("eval_" in the Trainer's).
    """
    lines = [f"{'':8}" + "".join(f"{title:>8}" for title in TITLES)]
    kinds = {"masks": "", "boxes": "box_"} | ({"boundary": "boundary_"} if f"{prefix}boundary_map" in metrics else {})
    for label, kind in kinds.items():
        values = [metrics.get(f"{prefix}{kind}{column}", -1.0) for column in COLUMNS]
        lines.append(f"{label:8}" + "".join(f"{_percent(value):>8}" for value in values))
    start = prefix + CLASS_KEY
    classes = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
    width = max([len("class"), *map(len, classes)]) + 2
    if classes:
        lines += ["", f"{'class':{width}}{'AP':>8}"]
    ranked = sorted(classes.items(), key=lambda item: -item[1])
    return "\n".join(lines + [f"{printable(name):{width}}{_percent(value):>8}" for name, value in ranked])


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"


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
