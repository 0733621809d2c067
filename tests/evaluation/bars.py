"""One image of vertical bars and its evaluation: small enough to calculate the results by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.inference.instances import Instances
from tests.evaluation.truth import categories_in, instances_from, rows_of

HEIGHT, WIDTH = 100, 200


def bar(x0: int, x1: int) -> bytes:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[:, x0:x1] = 1
    counts: bytes = coco_mask.encode(mask)["counts"]
    return counts


def picture(objects: list[tuple[int, int, int]], crowd: tuple[int, ...] = ()) -> dict[str, Any]:
    """One image whose objects are vertical bars: (category, x0, x1)."""
    coco: dict[str, Any] = {"images": [{"id": 7, "height": HEIGHT, "width": WIDTH, "file_name": "a.png"}]}
    coco["categories"] = [{"id": 3, "name": "cat"}, {"id": 8, "name": "=dog"}]
    coco["annotations"] = [
        {
            "id": number, "image_id": 7, "category_id": category, "iscrowd": int(number in crowd),
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": bar(x0, x1).decode()},
            "bbox": [x0, 0, x1 - x0, HEIGHT], "area": (x1 - x0) * HEIGHT,
        }
        for number, (category, x0, x1) in enumerate(objects)
    ]  # fmt: skip
    return coco


def evaluate(coco: dict[str, Any], found: list[Instances]) -> dict[str, Any]:
    evaluator = Evaluator(rows_of(coco), categories_in(coco))
    evaluator(found)
    return evaluator.details


def predicted_bars(*entries: tuple[int, float, int, int]) -> list[Instances]:
    """Predictions of the image: (category, score, x0, x1)."""
    ranked = sorted(entries, key=lambda one: -one[1])
    return [instances_from(7, (HEIGHT, WIDTH), [(c, score, bar(x0, x1)) for c, score, x0, x1 in ranked])]
