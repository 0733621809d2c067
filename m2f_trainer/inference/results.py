"""Prediction files: a JSON part per input while `m2f predict` runs, then COCO results, a CSV table and a COCO dataset.

Files are written atomically, and a part after its picture, so that an interrupted prediction can continue.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from m2f_trainer.inference.instances import Instances
from m2f_trainer.masks import rle
from m2f_trainer.masks.polygons import mask_to_polygons
from m2f_trainer.run_folder import csv_text, write_atomically

RESULTS, TABLE, DATASET = "predictions.json", "predictions.csv", "_annotations.coco.json"
COLUMNS = ("file_name", "image_id", "category_id", "category", "score", "x", "y", "width", "height", "area")


@dataclass(frozen=True)
class Record:
    """The predictions of one image or video frame: COCO results without image ids, each with `bbox` and `area`."""

    file_name: str
    height: int
    width: int
    instances: list[dict[str, Any]]


def record_of(file_name: str, instances: Instances) -> Record:
    """The record of an image's instances."""
    height, width = instances.size
    entries = []
    for entry, box in zip(instances.to_coco(), instances.boxes.tolist(), strict=True):
        del entry["image_id"]
        area = rle.area(rle.read_runs_of_any_size(entry["segmentation"]["counts"]))
        entries.append({**entry, "bbox": box, "area": area})
    return Record(file_name, height, width, entries)


def save_records(path: Path, key: Sequence[object], records: Sequence[Record]) -> None:
    """Write the records of one input, and `key`, which identifies the model, input and options they were made with."""
    write_atomically(path, json.dumps({"key": list(key), "records": [asdict(record) for record in records]}))


def load_records(path: Path, key: Sequence[object]) -> list[Record] | None:
    """The inverse of `save_records`; None if the file doesn't exist, is damaged, or has another key."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [Record(**record) for record in content["records"]] if content["key"] == list(key) else None
    except (ValueError, KeyError, TypeError):
        return None


def write_results(records: Sequence[Record], folder: Path, names: Mapping[int, str]) -> None:
    """Write predictions.json, COCO results with a `file_name` each, and predictions.csv."""
    numbered = [(image_id, record, entry) for image_id, record in enumerate(records) for entry in record.instances]
    results = [
        {
            "image_id": image_id,
            **{key: entry[key] for key in ("category_id", "segmentation", "score")},
            "file_name": record.file_name,
        }
        for image_id, record, entry in numbered
    ]
    write_atomically(folder / RESULTS, json.dumps(results))
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for image_id, record, entry in numbered:
        file_name, name = csv_text(record.file_name), csv_text(names.get(entry["category_id"], ""))
        score = f"{entry['score']:.6f}"
        table.writerow([file_name, image_id, entry["category_id"], name, score, *entry["bbox"], entry["area"]])
    write_atomically(folder / TABLE, text.getvalue())


def write_dataset(records: Sequence[Record], folder: Path, names: Mapping[int, str]) -> None:
    """Write the predictions as a COCO dataset with polygons, for annotation tools such as CVAT and Label Studio.

    Polygons have no holes, so holes are filled. Each annotation has its `score`.
    """
    annotations: list[dict[str, Any]] = []
    for image_id, record in enumerate(records):
        for entry in record.instances:
            polygons = polygons_of(entry["segmentation"])
            fields = {key: entry[key] for key in ("category_id", "bbox", "area", "score")}
            if polygons:
                identity = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0}
                annotations.append({**identity, **fields, "segmentation": polygons})
    images = [
        {"id": image_id, "file_name": name, "height": record.height, "width": record.width}
        for image_id, (record, name) in enumerate(zip(records, _names_below(records), strict=True))
    ]
    categories = [{"id": identity, "name": name, "supercategory": ""} for identity, name in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_atomically(folder / DATASET, json.dumps(content))


def _names_below(records: Sequence[Record]) -> list[str]:
    """Each file's path relative to the deepest folder that contains all of them, so that paths stay unique."""
    paths = [Path(os.path.normpath(Path(record.file_name).absolute())) for record in records]
    levels = zip(*(path.parent.parts for path in paths), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return [PurePath(*path.parts[shared:]).as_posix() for path in paths]


def polygons_of(segmentation: Mapping[str, Any]) -> list[list[float]]:
    """The polygons of a mask that this package wrote as compressed RLE, as of `mask_to_polygons`."""
    runs, height = rle.read_runs_of_any_size(segmentation["counts"]), segmentation["size"][0]
    box = rle.box_of(runs, height)
    return mask_to_polygons(rle.paint(runs, box, height).astype(np.bool_), box[0], box[1]) if box[2] > box[0] else []
