"""COCO mask and box AP of many images: hotcoco compared with pycocotools, both through `CocoMap`.

python -m benchmarks.scoring --images 5000 --dataset MY_COCO

Objects have masks of the dataset's annotations. Predictions, 100 an image, are such masks moved by a few pixels. Each
engine runs in a fresh process; that both give the same figures is checked.
"""

import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from pycocotools import mask as coco_mask

from benchmarks.measure import in_fresh_process, parser, peak_mb, report
from benchmarks.predictions import masks_of, nudged
from m2f_trainer.data.dataset import Category
from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.inference.instances import Instances, tight_boxes

SIZE, CLASSES, OBJECTS = (480, 640), 80, 7
POOL = 400  # different masks


def main() -> None:
    """Measure each number of images and print a table."""
    made = parser(__doc__ or "")
    made.add_argument("--images", type=int, nargs="+", default=[500, 5000])
    made.add_argument("--objects", type=int, default=OBJECTS, help="annotated objects an image")
    made.add_argument("--found", type=int, default=100, help="predictions an image")
    made.add_argument("--dataset", type=Path, help="a COCO folder to take masks from")
    arguments = made.parse_args()
    rows = [measure(count, arguments.objects, arguments.found, arguments.dataset) for count in arguments.images]
    report("Mask and box figures", rows, arguments)


def measure(images: int, objects: int, found: int, dataset: Path | None) -> dict[str, Any]:
    """One row."""
    ours, figures, memory = in_fresh_process(score, "hotcoco", images, objects, found, dataset)
    stock, expected, stock_memory = in_fresh_process(score, "pycocotools", images, objects, found, dataset)
    assert figures == expected
    return {
        "images": images,
        "predictions": images * found,
        "ours cpu s": ours,
        "stock cpu s": stock,
        "ratio": stock / ours,
        "ours MB": memory,
        "stock MB": stock_memory,
        "map": figures["map"],
    }


def score(
    engine: Any, images: int, objects: int, found: int, dataset: Path | None
) -> tuple[float, dict[str, float], float]:
    """CPU seconds, figures and peak MB of one engine."""
    rows, predictions = synthetic(images, objects, found, dataset)
    scorer = CocoMap(rows, [Category(key, f"class {key}") for key in range(1, CLASSES + 1)], engine=engine)
    figures: dict[str, float] = {}

    def run() -> None:
        figures.update(scorer(predictions))

    start = time.process_time()
    memory = peak_mb(run)
    return time.process_time() - start, figures, memory


def synthetic(images: int, objects: int, found: int, dataset: Path | None) -> tuple[Dataset, list[Instances]]:
    """Rows as `load_coco` returns them, all of `SIZE`, and predictions: each object's mask moved, and random masks."""
    rng = np.random.default_rng(0)
    masks = [fitted(mask) for mask in islice(masks_of(dataset), POOL)]
    truth = [encoded(mask) for mask in masks]
    guesses = [encoded(nudged(mask, rng)) for mask in masks]
    boxes = tight_boxes(truth)
    guessed_boxes, areas = tight_boxes(guesses), [float(mask.sum()) for mask in masks]
    rows: list[dict[str, Any]] = []
    predictions: list[Instances] = []
    for number in range(images):
        there = rng.integers(POOL, size=objects)
        classes = rng.integers(1, CLASSES + 1, size=objects)
        entries = [
            {"id": number * objects + k + 1, "category_id": int(classes[k]), "bbox": boxes[index].tolist(),
             "area": areas[index], "iscrowd": False, "counts": truth[index]["counts"].decode()}
            for k, index in enumerate(there)
        ]  # fmt: skip
        rows.append({"image_id": number, "height": SIZE[0], "width": SIZE[1], "objects": entries})
        guessed = np.concatenate([there, rng.integers(POOL, size=found - objects)])
        labels = np.concatenate([classes, rng.integers(1, CLASSES + 1, size=found - objects)])
        scores = np.sort(rng.random(found))[::-1].copy()
        predictions.append(
            Instances(number, labels, scores, [guesses[index] for index in guessed], guessed_boxes[guessed], SIZE)
        )
    return Dataset.from_list(rows), predictions


def fitted(mask: Any) -> Any:
    """A mask cropped or padded to SIZE; an empty one becomes a small square."""
    frame = np.zeros(SIZE, np.uint8)
    part = mask[: SIZE[0], : SIZE[1]]
    frame[: part.shape[0], : part.shape[1]] = part
    if not frame.any():
        frame[:20, :20] = 1
    return frame


def encoded(mask: Any) -> dict[str, Any]:
    rle: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask))
    return rle


if __name__ == "__main__":
    main()
