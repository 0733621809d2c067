"""Small ground truths, as dataset rows and as the COCO dictionary that they were made from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from m2f_trainer.data.dataset import Category
from m2f_trainer.inference.instances import Instances, tight_boxes

REAL_DATA = Path(os.environ.get("M2F_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))

VALUE = datasets.Value
OBJECT = {
    "id": VALUE("int64"),
    "category_id": VALUE("int64"),
    "bbox": datasets.List(VALUE("float64")),
    "area": VALUE("float64"),
    "iscrowd": VALUE("bool"),
    "counts": VALUE("string"),
}
FEATURES = datasets.Features(
    {"image_id": VALUE("int64"), "height": VALUE("int32"), "width": VALUE("int32"), "objects": datasets.List(OBJECT)}
)


def real_annotations(name: str, split: str) -> dict[str, Any]:
    path = REAL_DATA / name / split / "_annotations.coco.json"
    if not path.exists():
        pytest.skip(f"no real data at {path}; set M2F_TEST_DATA to the folder that has it")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def counts_of(segmentation: Any, height: int, width: int) -> str:
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        return str(segmentation["counts"])
    return str(rle["counts"].decode())


def rows_of(coco: dict[str, Any]) -> datasets.Dataset:
    """The rows that `load_coco` makes of an annotation file, without the images."""
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    for item in coco["annotations"]:
        kept = {key: item[key] for key in ("id", "category_id", "bbox", "area")}
        counts = counts_of(item["segmentation"], *sizes[item["image_id"]])
        objects[item["image_id"]].append(kept | {"iscrowd": bool(item["iscrowd"]), "counts": counts})
    rows = [
        {"image_id": key, "height": size[0], "width": size[1], "objects": objects[key]} for key, size in sizes.items()
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def categories_in(coco: dict[str, Any]) -> list[Category]:
    return [Category(id=item["id"], name=item["name"]) for item in coco["categories"]]


def dense_image(objects: int, categories: int) -> dict[str, Any]:
    """One image of bars of one pixel, every second column, of categories 1, 2, ... in turn."""
    size = [20, 2 * objects]
    coco: dict[str, Any] = {"images": [{"id": 1, "height": size[0], "width": size[1], "file_name": "a.png"}]}
    coco["categories"] = [{"id": number, "name": f"c{number}"} for number in range(1, categories + 1)]
    coco["annotations"] = []
    for number in range(objects):
        mask = np.zeros(size, np.uint8, order="F")
        mask[: 10 + number % 10, 2 * number] = 1
        rle = coco_mask.encode(mask)
        coco["annotations"].append(
            {
                "id": number + 1, "image_id": 1, "category_id": 1 + number % categories, "iscrowd": 0,
                "segmentation": {"size": size, "counts": rle["counts"].decode()},
                "bbox": coco_mask.toBbox(rle).tolist(), "area": float(coco_mask.area(rle)),
            }
        )  # fmt: skip
    return coco


def instances_from(image_id: int, size: tuple[int, int], found: list[tuple[int, float, bytes]]) -> Instances:
    rles = [{"size": list(size), "counts": counts} for _, _, counts in found]
    category_ids = np.array([item[0] for item in found], np.int64)
    scores = np.array([item[1] for item in found], np.float64)
    return Instances(image_id, category_ids, scores, rles, tight_boxes(rles), size)


def perfect(rows: datasets.Dataset) -> list[Instances]:
    """Every object except crowd regions, predicted exactly with score 1."""
    return [
        instances_from(
            row["image_id"],
            (row["height"], row["width"]),
            [(item["category_id"], 1.0, item["counts"].encode()) for item in row["objects"] if not item["iscrowd"]],
        )
        for row in rows
    ]


def blob(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    ys, xs = np.mgrid[0:height, 0:width]
    radius = np.exp(generator.uniform(np.log(3), np.log(80)))
    centre = generator.uniform(0, height), generator.uniform(0, width)
    shape = ((ys - centre[0]) / radius) ** 2 + ((xs - centre[1]) / radius / generator.uniform(0.5, 1.5)) ** 2 < 1
    shape[int(centre[0]), int(centre[1])] = True
    return np.asfortranarray(shape.astype(np.uint8))


def synthetic(images: int, seed: int, categories: int = 5) -> tuple[dict[str, Any], list[Instances]]:
    """Overlapping blobs with crowds, an annotation with id 0, empty images, misses, doubles, ties and wrong classes."""
    generator = np.random.default_rng(seed)
    ids = [3 * k + 2 for k in range(categories)]
    coco: dict[str, Any] = {"images": [], "annotations": []}
    coco["categories"] = [{"id": key, "name": f"thing {key}"} for key in [*ids, 999]]
    predictions = []
    for number in range(images):
        size = (int(generator.integers(60, 200)), int(generator.integers(60, 200)))
        image_id = 1000 - 7 * number
        coco["images"].append({"id": image_id, "height": size[0], "width": size[1], "file_name": f"{number}.png"})
        found = []
        for _ in range(0 if number % 9 == 8 else int(generator.integers(1, 12))):
            mask, category = blob(generator, size), int(generator.choice(ids))
            rle = coco_mask.encode(mask)
            item = {"id": len(coco["annotations"]), "image_id": image_id, "category_id": category}
            item |= {"segmentation": {"size": list(size), "counts": rle["counts"].decode()}}
            item |= {"bbox": coco_mask.toBbox(rle).tolist(), "area": float(coco_mask.area(rle))}
            coco["annotations"].append(item | {"iscrowd": int(generator.random() < 0.1)})
            for _ in range(int(generator.integers(0, 3))):
                shifted = np.asfortranarray(
                    np.roll(mask, int(generator.integers(-4, 5)), axis=int(generator.integers(2)))
                )
                guess = category if generator.random() < 0.8 else int(generator.choice([*ids, 77]))
                found.append((guess, round(float(generator.random()), 1), coco_mask.encode(shifted)["counts"]))
        found += [(ids[0], 0.0, coco_mask.encode(np.zeros(size, np.uint8, order="F"))["counts"])]
        predictions.append(instances_from(image_id, size, found))
    return coco, predictions
