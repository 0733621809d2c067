"""Files of predictions: records that are read again, COCO results, a table and a dataset."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.inference.results import Record, load_records, record_of, save_records, write_dataset, write_results

NAMES = {3: "cell", 8: "=1+1"}


def record(file_name: str) -> Record:
    """A ring in the middle, and a rectangle of 4 x 2 pixels at (1, 5)."""
    y, x = np.mgrid[:30, :40]
    distance = np.hypot(y - 15, x - 20)
    ring = (distance < 9) & (distance > 4)
    rectangle = (x >= 1) & (x < 5) & (y >= 5) & (y < 7)
    rles = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in (ring, rectangle)]
    return record_of(
        file_name, Instances(0, np.array([3, 8]), np.array([0.75, 0.5]), rles, tight_boxes(rles), (30, 40))
    )


def test_area_and_box_of_a_record_are_pycocotools_own() -> None:
    for entry in record("a.png").instances:
        assert entry["area"] == coco_mask.area(entry["segmentation"])
        assert entry["bbox"] == coco_mask.toBbox(entry["segmentation"]).tolist()


def test_records_are_read_again_only_for_the_key_they_were_written_with(tmp_path: Path) -> None:
    given = [record("a.png"), record("b.png")]
    save_records(tmp_path / "part.json", ["model", 0.5], given)
    assert load_records(tmp_path / "part.json", ["model", 0.5]) == given
    assert load_records(tmp_path / "part.json", ["model", 0.6]) is None
    assert load_records(tmp_path / "none.json", ["model", 0.5]) is None


@pytest.mark.parametrize(
    "content", [b"", b'{"key": ["model"', b"\xff\xfe", b"[]", b'{"key": ["m"], "records": [{"a": 1}]}']
)
def test_damaged_records_count_as_absent(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "part.json").write_bytes(content)
    assert load_records(tmp_path / "part.json", ["m"]) is None


def test_results_and_table_number_the_images_in_order(tmp_path: Path) -> None:
    write_results([record("a.png"), Record("b.png", 9, 9, []), record("c.png")], tmp_path, NAMES)
    results = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert [(one["image_id"], one["file_name"]) for one in results] == [(0, "a.png")] * 2 + [(2, "c.png")] * 2
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == ["0", "0", "2", "2"]
    assert [row["category"] for row in rows] == ["cell", "'=1+1"] * 2, "a formula is written as text"
    assert {key: rows[1][key] for key in ("x", "y", "width", "height", "area", "score")} == {
        "x": "1.0", "y": "5.0", "width": "4.0", "height": "2.0", "area": "8", "score": "0.500000",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_a_dataset_of_predictions_is_read_by_pycocotools_with_holes_filled(tmp_path: Path) -> None:
    write_dataset([record("in/a/1.png"), record("in/b/1.png")], tmp_path, NAMES)
    coco = COCO(str(tmp_path / "_annotations.coco.json"))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a/1.png", "b/1.png"]
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == ["cell", "=1+1"]
    ring, rectangle = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    y, x = np.mgrid[:30, :40]
    assert np.array_equal(coco.annToMask(ring), np.hypot(y - 15, x - 20) < 9)
    assert np.array_equal(coco.annToMask(rectangle), (x >= 1) & (x < 5) & (y >= 5) & (y < 7))
