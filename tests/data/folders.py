"""Small COCO folders for tests, and the path of the real datasets."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REAL = Path(os.environ.get("M2F_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="real images: set M2F_TEST_DATA to a folder with coco_tiny and nuclei_tiny"
)
SQUARE = [[2, 3, 12, 3, 12, 11, 2, 11]]


def annotation(number: int = 1, **changes: Any) -> dict[str, Any]:
    entry = {"id": number, "image_id": 1, "category_id": 5, "segmentation": SQUARE, "bbox": [2, 3, 10, 8], "area": 80}
    return {**entry, "iscrowd": 0, **changes}


def content(*annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    images = [{"id": 1, "file_name": "a.png", "height": 16, "width": 20}]
    names = [{"id": 5, "name": "cell"}]
    return {"images": images, "categories": names, "annotations": list(annotations or [annotation()]), **changes}


def write(folder: Path, coco: object, split: str = "train", size: tuple[int, int] = (20, 16)) -> Path:
    """One split in the Roboflow layout; returns the dataset's root."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, dtype=np.uint8)).save(folder / split / "a.png")
    text = coco if isinstance(coco, str) else json.dumps(coco)
    (folder / split / "_annotations.coco.json").write_text(text)
    return folder
