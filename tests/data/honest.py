"""A valid dataset, six images of 20 x 16 pixels with one square each, and variants of how it is written."""

import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.masks import segmentation as masks

Coco = dict[str, Any]
SQUARE = [2, 3, 12, 3, 12, 11, 2, 11]
COUNTS = [35, *([8, 8] * 9), 8, 133]  # of the same square, column by column


def picture(path: Path, size: tuple[int, int] = (20, 16), **options: Any) -> None:
    """Write an image whose pixels depend on its name, so that images are not duplicates of each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(str(path.name).encode("utf-8", "surrogateescape"))
    noise = np.random.default_rng(seed).integers(0, 255, size=(4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(path, **options)


def base() -> Coco:
    return {
        "images": [{"id": k, "file_name": f"img_{k - 1}.png", "height": 16, "width": 20} for k in range(1, 7)],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "segmentation": [list(SQUARE)], "bbox": [2, 3, 10, 8]}
            | {"area": 80, "iscrowd": 0}
            for k in range(1, 7)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }


def dataset(root: Path, change: Callable[[Coco], Any] = lambda coco: None, folder: str = "images") -> Path:
    """The dataset with a change of its annotations; images are in `folder`."""
    coco = base()
    for image in coco["images"]:
        picture(root / folder / image["file_name"])
    changed = copy.deepcopy(coco)
    change(changed)
    root.mkdir(exist_ok=True)
    (root / "annotations.json").write_text(json.dumps(changed), encoding="utf-8")
    return root


def objects(root: Path, cache: Path) -> list[tuple[str, str, list[list[int]]]]:
    """File name, class name and mask of every object of a dataset, sorted; each image file is listed, too."""
    found = []
    for rows in load_coco(root, cache_dir=cache).values():
        names = {one.id: one.name for one in categories_of(rows)}
        for row in rows:
            file = Path(row["image"]["path"]).name
            for one in row["objects"]:
                mask = masks.decode(one["counts"], row["height"], row["width"])
                found.append((file, names[one["category_id"]], mask.tolist()))
    return sorted(found)
