"""Data loading, compared with the transformers example: CPU milliseconds a training sample, and memory.

    python -m benchmarks.data [--instances 20] [--samples 40]

The example decodes the image, flips it and runs Mask2FormerImageProcessor on a map of instance ids. Its colour changes
are left out, so its time is a lower bound. Ours is the training transform, once with output of the example's size and
once with the default large-scale jitter. Both read the same JPEG, in turns.
"""

import argparse
import io
import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import in_fresh_process, peak_mb

SIDE = 1024


def synthetic_row(instances: int, height: int = 480, width: int = 640) -> dict[str, Any]:
    """A dataset row: smooth noise as a JPEG, and overlapping polygons of 8 to 40 points."""
    from m2f_trainer.masks import segmentation as masks

    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, size=(height // 8, width // 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    objects = []
    for k in range(instances):
        points = int(rng.integers(8, 41))
        angles = np.sort(rng.uniform(0, 2 * np.pi, points))
        radii = rng.uniform(0.6, 1, points) * rng.uniform(15, 90)
        outline = rng.uniform((60, 60), (width - 60, height - 60)) + radii[:, None] * np.stack(
            [np.cos(angles), np.sin(angles)], axis=1
        )
        polygon = outline.clip(0, (width, height)).reshape(-1).tolist()
        counts = masks.to_counts([polygon], height, width, "benchmark")
        objects.append({"id": k + 1, "category_id": k % 5, "iscrowd": False, "counts": counts})
    image = {"path": None, "bytes": buffer.getvalue()}
    return {"image": image, "image_id": 1, "height": height, "width": width, "objects": objects}


class StockPath:
    """The preprocessing of one image in transformers' examples/pytorch/instance-segmentation."""

    def __init__(self, side: int = SIDE) -> None:
        from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

        self.processor = Mask2FormerImageProcessorPil(
            size={"height": side, "width": side}, do_resize=True, do_reduce_labels=False, ignore_index=255
        )

    def __call__(self, row: dict[str, Any], index: int) -> Any:
        from m2f_trainer.masks import segmentation as masks

        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        ids = np.zeros((row["height"], row["width"]), dtype=np.int32)
        for k, one in enumerate(row["objects"]):
            ids[masks.decode(one["counts"], row["height"], row["width"]) != 0] = k + 1
        if index % 2:
            pixels, ids = pixels[:, ::-1], ids[:, ::-1]
        classes = {0: 255, **{k + 1: one["category_id"] for k, one in enumerate(row["objects"])}}
        pixels, ids = np.ascontiguousarray(pixels), np.ascontiguousarray(ids)
        return self.processor(
            images=[pixels], segmentation_maps=[ids], instance_id_to_semantic_id=classes, return_tensors="pt"
        )


def times(instances: int, samples: int) -> dict[str, float]:
    """CPU milliseconds a sample for each of three variants, run in turns."""
    import torch

    from m2f_trainer.data.transforms import TrainTransform

    torch.set_num_threads(1)
    row, stock = synthetic_row(instances), StockPath()
    same = TrainTransform(SIDE, SIDE, lsj_min_scale=1.0, lsj_max_scale=1.0)
    jitter = TrainTransform(SIDE, SIDE)
    paths = {
        "stock": lambda k: stock(row, k),
        "ours, same size": lambda k: same(row, 0, k),
        "ours, jitter": lambda k: jitter(row, 0, k),
    }
    spent = dict.fromkeys(paths, 0.0)
    for k in range(-2, samples):
        for name, path in paths.items():
            start = time.process_time()
            path(k + 2)
            spent[name] += (time.process_time() - start) * (k >= 0)
    return {name: 1000 * seconds / samples for name, seconds in spent.items()}


def memory(path: str, instances: int) -> float:
    """Peak MB that a batch of one image adds; call it in a fresh process."""
    from m2f_trainer.data.collate import collate
    from m2f_trainer.data.transforms import TrainTransform

    few, row = synthetic_row(1), synthetic_row(instances)
    if path == "ours":
        transform = TrainTransform(SIDE, SIDE, lsj_min_scale=1.0, lsj_max_scale=1.0)

        def make(one: dict[str, Any]) -> object:
            sample = transform(one)
            return collate([{**sample, "class_labels": sample["category_ids"]}])
    else:
        stock = StockPath()

        def make(one: dict[str, Any]) -> object:
            return stock(one, 0)

    make(few)
    return peak_mb(lambda: make(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--samples", type=int, default=40)
    options = parser.parse_args()
    milliseconds = times(options.instances, options.samples)
    print(f"CPU ms a sample, 640x480 photo with {options.instances} instances -> {SIDE}x{SIDE}, one thread")
    for name, spent in milliseconds.items():
        print(f"  {name:16} {spent:7.1f} ms   {milliseconds['stock'] / spent:5.1f} x")
    print(f"peak MB that one image with many instances adds at {SIDE}x{SIDE} (stock: at most 255 instances)")
    for name, instances in (("stock", 255), ("ours", 255), ("ours", 400)):
        print(f"  {name:5} {instances:4} {in_fresh_process(memory, name, instances):12.0f} MB")


if __name__ == "__main__":
    main()
