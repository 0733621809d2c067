"""Tiled prediction compared with single images: python -m benchmarks.mosaic MODEL DATASET [--side PIXELS] [--overlap
SHARE]

Takes the images of a split that have its most common size and repeats them side by side in a square mosaic. Predicts
the mosaic in tiles of that size, so that tiles and single images have the same scale; the tiles overlap and lie across
image borders. Cuts the instances at the borders, and prints the AP of these and of the images predicted alone.
"""

import argparse
import json
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from m2f_trainer.data.dataset import categories_of
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.data.images import open_image
from m2f_trainer.data.tiles import Tiling
from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.masks import rle
from m2f_trainer.masks.rle import Box, intersection

THRESHOLD = 0.05
KEPT = ("map", "map_50", "map_75")


def of_one_size(rows: Dataset) -> tuple[Dataset, int, int]:
    """The rows of the most common image size, and that size (H, W)."""
    sizes = list(zip(rows["height"], rows["width"], strict=True))
    most_common = Counter(sizes).most_common(1)[0][0]
    return rows.select([index for index, size in enumerate(sizes) if size == most_common]), *most_common


def repeated(rows: Dataset, count: int) -> Dataset:
    """`count` rows, repeated from the first, each with its own image id."""
    chosen = rows.select([index % len(rows) for index in range(count)])
    return chosen.map(lambda _, index: {"image_id": index}, with_indices=True)


def cut(found: Instances, places: list[Box]) -> Iterator[Instances]:
    """Instances of the mosaic -> instances of each place, cut to its box, with its number as image id."""
    x0, y0, width, height = found.boxes.T.astype(int)
    boxes: NDArray[np.int64] = np.stack([x0, y0, x0 + width, y0 + height], 1)
    for number, (left, top, right, bottom) in enumerate(places):
        near = np.flatnonzero(
            (boxes[:, 0] < right) & (boxes[:, 1] < bottom) & (boxes[:, 2] > left) & (boxes[:, 3] > top)
        )
        size, kept, rles = (bottom - top, right - left), [], []
        for index in near.tolist():
            x0, y0, x1, y1 = intersection(tuple(boxes[index].tolist()), (left, top, right, bottom))
            runs = rle.read_runs_of_any_size(found.rles[index]["counts"])
            mask = np.zeros(size, np.uint8, order="F")
            mask[y0 - top : y1 - top, x0 - left : x1 - left] = rle.paint(runs, (x0, y0, x1, y1), found.size[0])
            if mask.any():
                kept.append(index)
                rles.append(coco_mask.encode(mask))
        yield Instances(number, found.category_ids[kept], found.scores[kept], rles, tight_boxes(rles), size)


def peak_mb() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """AP, CPU seconds and memory of both predictions."""
    predictor = Predictor.from_pretrained(given.model)
    predictor.tiling = None
    rows, height, width = of_one_size(load_dataset(given.dataset)[given.split])
    down, across = given.side // height, given.side // width
    rows = rows.select(range(min(len(rows), down * across)))
    images = [np.asarray(open_image(row["image"], str(row["image_id"]))) for row in rows]
    start = time.process_time()
    alone = list(predictor.stream(iter(images), threshold=THRESHOLD))
    seconds_alone = (time.process_time() - start) / len(images)
    corners = [(y * height, x * width) for y in range(down) for x in range(across)]
    places: list[Box] = [(x, y, x + width, y + height) for y, x in corners]
    mosaic = np.zeros((down * height, across * width, 3), np.uint8)
    for number, (x0, y0, x1, y1) in enumerate(places):
        mosaic[y0:y1, x0:x1] = images[number % len(images)]
    before, start = peak_mb(), time.process_time()
    predictor.tiling = Tiling(max(height, width), given.overlap, predictor.padded_size)
    (found,) = predictor(mosaic, threshold=THRESHOLD)
    seconds, after = time.process_time() - start, peak_mb()
    scorer = CocoMap(repeated(rows, len(places)), categories_of(rows))
    singly = scorer([replace(alone[number % len(alone)], image_id=number) for number in range(len(places))])
    tiled = scorer(cut(found, places))
    return {
        "mosaic": f"{mosaic.shape[0]}x{mosaic.shape[1]}",
        "images": len(places),
        "different_images": len(images),
        "tile": max(height, width),
        "overlap": given.overlap,
        "instances": len(found),
        **{f"{name}_alone": singly[name] for name in KEPT},
        **{f"{name}_tiled": tiled[name] for name in KEPT},
        "cpu_seconds_an_image_alone": round(seconds_alone, 3),
        "cpu_seconds_tiled": round(seconds, 1),
        "memory_before_mb": before,
        "memory_after_mb": after,
    }


def main() -> None:
    """Measure and print as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--split", default="valid")
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
