"""A COCO folder of squares."""

import json
from pathlib import Path
from typing import Any


def square(image_id: int, x: int, y: int, side: int = 8, category: int = 3) -> dict[str, Any]:
    """An annotation without id."""
    outline = [x, y, x + side, y, x + side, y + side, x, y + side]
    fields = {"image_id": image_id, "category_id": category, "iscrowd": 0, "area": side * side}
    return {**fields, "bbox": [x, y, side, side], "segmentation": [outline]}


def write_squares(folder: Path, objects: list[dict[str, Any]]) -> Path:
    """Write a train and a valid split, both with two images of 128 x 128 (without files) and these objects."""
    images = [{"id": k, "file_name": f"{k}.png", "height": 128, "width": 128} for k in (1, 2)]
    annotations = [{"id": k, **one} for k, one in enumerate(objects, start=1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "square"}]}
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
