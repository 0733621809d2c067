"""COCO mask and box figures of many images, hotcoco beside pycocotools, both behind `CocoMap`.

python -m benchmarks.scoring --images 5000 --dataset MY_COCO

The truth is the dataset's annotations, image after image until there are enough; predictions are those masks nudged by
a few pixels, 100 an image. Each engine runs in a process of its own; both give the same figures, which is checked.
"""

import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from pycocotools import mask as coco_mask

from benchmarks.found import masks_of, nudged
from benchmarks.measure import in_a_process, parser, peak_mb, report
from m2f_trainer.data.dataset import Category
from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.inference.instances import Instances, tight_boxes

SIZE, CLASSES, OBJECTS = (480, 640), 80, 7
POOL = 400  # different masks


def main() -> None:
    """Measure every number of images asked for, and print them."""
    made = parser(__doc__ or "")
    made.add_argument("--images", type=int, nargs="+", default=[500, 5000])
    made.add_argument("--objects", type=int, default=OBJECTS, help="true objects an image")
    made.add_argument("--found", type=int, default=100, help="predictions an image")
    made.add_argument("--dataset", type=Path, help="a COCO folder to take masks from")
    arguments = made.parse_args()
    rows = [measure(count, arguments.objects, arguments.found, arguments.dataset) for count in arguments.images]
    report("Mask and box figures", rows, arguments)


def measure(images: int, objects: int, found: int, dataset: Path | None) -> dict[str, Any]:
    """One row."""
    told = {
        engine: in_a_process(score, engine, images, objects, found, dataset) for engine in ("hotcoco", "pycocotools")
    }
    (ours, figures, memory), (stock, expected, stock_memory) = told.values()
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
    rows, predictions = made_up(images, objects, found, dataset)
    scorer = CocoMap(rows, [Category(key, f"class {key}") for key in range(1, CLASSES + 1)], engine=engine)
    figures: dict[str, float] = {}

    def run() -> None:
        figures.update(scorer(predictions))

    start = time.process_time()
    memory = peak_mb(run)
    return time.process_time() - start, figures, memory


def made_up(images: int, objects: int, found: int, dataset: Path | None) -> tuple[Dataset, list[Instances]]:
    """Rows as `load_coco` gives them, of one size, and predictions: true masks nudged, and others' masks."""
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
    """A mask cut or filled up to SIZE; one that would be empty becomes a small square."""
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
