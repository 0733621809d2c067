"""Cut a COCO dataset into square tiles: python -m benchmarks.accuracy.tiles DATASET OUT SIDE

Small images at the original resolution make trainings on real data short. At most `MOST` x `MOST` tiles are cut from an
image. Objects are cut at the edges of the tiles; parts of fewer than `LEAST` pixels are dropped.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from m2f_trainer.data.dataset import categories_of
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.data.images import open_image
from m2f_trainer.masks.segmentation import decode, encode

MOST, LEAST = 2, 16


def cut(rows: Dataset, folder: Path, side: int) -> tuple[int, int]:
    """Write one split; return how many tiles and objects it has."""
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for row in rows:
        picture = open_image(row["image"], f"image {row['image_id']}")
        height, width = row["height"], row["width"]
        masks = [decode(one["counts"], height, width) for one in row["objects"] if not one["iscrowd"]]
        classes = [one["category_id"] for one in row["objects"] if not one["iscrowd"]]
        for top in range(0, min(height - side + 1, MOST * side), side):
            for left in range(0, min(width - side + 1, MOST * side), side):
                image = {"id": len(images) + 1, "height": side, "width": side}
                image["file_name"] = f"{row['image_id']}_{top}_{left}.png"
                picture.crop((left, top, left + side, top + side)).save(folder / image["file_name"])
                images.append(image)
                for mask, category in zip(masks, classes, strict=True):
                    part = mask[top : top + side, left : left + side]
                    if part.sum() >= LEAST:
                        objects.append({"id": len(objects) + 1, "image_id": image["id"], **entry(part, category)})
    categories = [vars(category) for category in categories_of(rows)]
    written = {"images": images, "annotations": objects, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(written), encoding="utf-8")
    return len(images), len(objects)


def entry(mask: NDArray[np.uint8], category: int) -> dict[str, Any]:
    """The annotation of a mask (side, side)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    segmentation = {"size": list(mask.shape), "counts": encode(mask)}
    fields = {"category_id": category, "iscrowd": 0, "area": int(mask.sum())}
    return {**fields, "bbox": box, "segmentation": segmentation}


def main(dataset: str, out: Path, side: int) -> None:
    """Cut every split."""
    for split, rows in load_dataset(dataset).items():
        tiles, objects = cut(rows, out / split, side)
        print(f"{split}: {tiles} tiles, {objects} objects")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
