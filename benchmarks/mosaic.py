"""Tiled prediction against single images: python -m benchmarks.mosaic MODEL DATASET [--side PIXELS] [--overlap SHARE]

Lays the images of a split, each at its own size, into a mosaic of rows, over and over until it has the side asked for;
predicts the mosaic by tiles of the model's frame, cuts what was found at the images' borders again, and scores it
against the annotations beside what the images alone give. Says the highest memory of the process before and after.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from pycocotools import mask as coco_mask

from m2f_trainer.data.hub import load_dataset
from m2f_trainer.data.images import open_image
from m2f_trainer.evaluation.coco_map import CocoMap
from m2f_trainer.evaluation.instances import Instances, tight_boxes
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.inference.tiles import predict_tiled
from m2f_trainer.inference.windows import ArrayWindows, Pixels


@dataclass(frozen=True)
class Place:
    """Image `row` of the split lies with its corner at (y, x)."""

    row: int
    y: int
    x: int


def lay(images: list[Pixels], side: int) -> tuple[Pixels, list[Place]]:
    """Images in rows from the top left, as many as fit whole; what is left over stays black."""
    mosaic, places = np.zeros((side, side, 3), np.uint8), []
    y = x = tallest = number = 0
    while True:
        image = images[number % len(images)]
        if x + image.shape[1] > side:
            y, x, tallest = y + tallest, 0, 0
        if y + image.shape[0] > side:
            return mosaic, places
        mosaic[y : y + image.shape[0], x : x + image.shape[1]] = image
        places.append(Place(number % len(images), y, x))
        x, tallest, number = x + image.shape[1], max(tallest, image.shape[0]), number + 1


def cut(found: Instances, places: list[Place], images: list[Pixels]) -> Iterator[Instances]:
    """The mosaic's instances as those of each image: what lies within it of each."""
    boxes = found.boxes.astype(int)
    for place in places:
        height, width = images[place.row].shape[:2]
        x0, y0 = boxes[:, 0] - place.x, boxes[:, 1] - place.y
        near = np.flatnonzero((x0 < width) & (x0 + boxes[:, 2] > 0) & (y0 < height) & (y0 + boxes[:, 3] > 0))
        window = slice(place.y, place.y + height), slice(place.x, place.x + width)
        masks = [coco_mask.decode(found.rles[index])[window] for index in near]
        kept = [number for number, mask in enumerate(masks) if mask.any()]
        rles = [coco_mask.encode(np.asfortranarray(masks[number])) for number in kept]
        chosen = near[kept]
        yield Instances(
            place.row, found.category_ids[chosen], found.scores[chosen], rles, tight_boxes(rles), (height, width)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--split", default="valid")
    given = parser.parse_args()
    predictor, rows = Predictor.from_pretrained(given.model), load_dataset(given.dataset)[given.split]
    images = [np.asarray(open_image(row["image"], str(row["image_id"]))) for row in rows]
    mosaic, places = lay(images, given.side)
    seen = sorted({place.row for place in places})
    alone = [replace(predictor(images[row], threshold=0.05)[0], image_id=rows[row]["image_id"]) for row in seen]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    tile = max(predictor.padded_size)
    found = predict_tiled(predictor, ArrayWindows(mosaic), tile, given.overlap, threshold=0.05)
    seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = {place.row: one for place, one in reversed(list(zip(places, cut(found, places, images), strict=True)))}
    tiled = [replace(first[row], image_id=rows[row]["image_id"]) for row in seen]
    scorer = CocoMap(rows.select(seen))
    figures = {
        "side": given.side,
        "images": len(places),
        "different_images": len(seen),
        "tile": tile,
        "overlap": given.overlap,
        "instances": len(found),
        "ap_alone": scorer(alone)["map"],
        "ap_tiled": scorer(tiled)["map"],
        "cpu_seconds": round(seconds, 1),
        "memory_before_mb": before // 1024,
        "memory_after_mb": after // 1024,
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
