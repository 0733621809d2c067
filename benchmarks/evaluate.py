"""Evaluation, compared with transformers': from logits to run lengths, or the whole of it from pixels to AP.

python -m benchmarks.evaluate --dataset MY_COCO
python -m benchmarks.evaluate --whole 500 --dataset MY_COCO

Stock is the transformers example: `post_process_instance_segmentation` with binary maps, then pycocotools, which the
example's torchmetrics also uses. The weights are random, so forward passes are timed and their outputs replaced by
logits made from a dataset's annotations or from ellipses. The example passes the labels to the model and so also
computes the loss of every decoder output. That is part of its time and also shown separately.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from transformers import Mask2FormerImageProcessorPil
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from benchmarks import scoring
from benchmarks.measure import alternate, compared, in_fresh_process, parser, peak_mb, report
from benchmarks.predictions import class_logits, logits_of
from benchmarks.stock import BACKBONES, CATEGORIES, our_model, scene, stock_model
from m2f_trainer.data.geometry import resize_to_fit
from m2f_trainer.inference.postprocess import to_instances

Case = tuple[tuple[int, int], int, int, Path | None, str, int]
"""Original size, queries, side of the model's input, dataset, device, threads."""


def main() -> None:
    """Measure each image size and print a table."""
    made = parser(__doc__ or "")
    made.add_argument("--queries", type=int, default=100)
    made.add_argument("--side", type=int, default=1024, help="the model's input")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--size", nargs="+", default=["480x640", "1536x2048"], help="HEIGHTxWIDTH of the image")
    made.add_argument("--dataset", type=Path, help="a COCO folder to take masks from")
    made.add_argument("--whole", type=int, metavar="N", help="the whole evaluation of N images")
    made.add_argument("--measured", type=int, default=3, metavar="N", help="with --whole: time N images and scale [3]")
    made.add_argument("--backbone", default="vits16plus", choices=list(BACKBONES))
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    kind = whole if arguments.whole else masks
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.size]
    rows = [kind(arguments, (height, width)) for height, width in sizes]
    report("The whole evaluation" if arguments.whole else "Logits to COCO run lengths, one image", rows, arguments)


def masks(arguments: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """One row: time for one image, measured here, and peak memory, measured in a fresh process for each side."""
    case = (size, arguments.queries, arguments.side, arguments.dataset, arguments.device, arguments.threads)
    seconds = alternate(stages(*case), arguments.repeats, arguments.device)
    peaks = {name: in_fresh_process(peak_of, name, *case) for name in ("ours", "stock")}
    return {
        "height x width": f"{size[0]}x{size[1]}",
        "queries": arguments.queries,
        **compared(seconds, arguments.device),
        **{f"{name} MB": peak for name, peak in peaks.items()},
    }


def peak_of(name: str, *case: Any) -> float:
    """Peak MB of "ours" or "stock". A small image is processed first, so that libraries are loaded."""
    torch.set_num_threads(case[-1])
    stages((32, 32), 2, 64, None, *case[-2:])[name]()
    return peak_mb(stages(*case)[name], case[-2])


def stages(
    size: tuple[int, int], queries: int, side: int, dataset: Path | None, device: str, threads: int
) -> dict[str, Callable[[], int]]:
    """Functions that turn the logits of one image into encoded masks: ours and stock."""
    frames, cells = resize_to_fit(size, (side, side)), (side // 4, side // 4)
    inside = (-(-frames.resized[0] // 4), -(-frames.resized[1] // 4))
    logits = logits_of(dataset, queries, cells, inside).to(device)
    classes = class_logits(queries).to(device)
    output = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=logits)
    processor = Mask2FormerImageProcessorPil()

    def stock() -> int:
        found = processor.post_process_instance_segmentation(
            output, threshold=0.0, target_sizes=[size], return_binary_maps=True
        )[0]["segmentation"]
        columns = np.asfortranarray(found.cpu().numpy().astype(np.uint8).transpose(1, 2, 0))
        return len(coco_mask.encode(columns))

    def ours() -> int:
        found = to_instances(
            classes, logits, image_ids=[0], original_sizes=[size], resized_sizes=[frames.resized],
            padded_size=(side, side), category_ids=list(range(len(CATEGORIES))),
        )  # fmt: skip
        return len(found[0])

    return {"stock": stock, "ours": ours}


def whole(arguments: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """One row: forward passes and masks timed on a few images and scaled to all, and the scoring of all."""
    case = (size, arguments.queries, arguments.side, arguments.dataset, arguments.device, arguments.threads)
    forward = alternate(forwards(arguments, scoring.OBJECTS), arguments.measured, arguments.device)
    encode = alternate(stages(*case), arguments.measured, arguments.device)
    score = scoring.measure(arguments.whole, scoring.OBJECTS, 100, arguments.dataset)
    clock, count = "cpu" if arguments.device == "cpu" else "wall", arguments.whole
    parts = {
        name: {
            "forward": count * forward[name][clock],
            "masks": count * encode[name][clock],
            "scoring": score[f"{name} cpu s"],
        }
        for name in ("ours", "stock")
    }
    total = {name: sum(part.values()) for name, part in parts.items()}
    return {
        "images": count,
        "height x width": f"{size[0]}x{size[1]}",
        **{f"{name} {part} s": seconds for name in parts for part, seconds in parts[name].items()},
        **{f"{name} images/s": count / seconds for name, seconds in total.items()},
        "stock's loss s": count * (forward["stock"][clock] - forward["stock without loss"][clock]),
        "ratio": total["stock"] / total["ours"],
    }


def forwards(arguments: argparse.Namespace, objects: int) -> dict[str, Callable[[], object]]:
    """Forward passes of one image with the same weights: ours, the example's, and the example's without the loss."""
    ours = our_model(arguments.backbone, arguments.side).to(arguments.device).eval()
    stock = stock_model(ours).to(arguments.device).eval()
    our_batch, stock_batch = scene(1, arguments.side, objects, arguments.device)

    @torch.inference_mode()
    def our_pass() -> object:
        return ours(pixel_values=our_batch["pixel_values"])

    @torch.no_grad()
    def stock_pass() -> object:
        return stock(**stock_batch)

    @torch.no_grad()
    def without_loss() -> object:
        return stock(pixel_values=stock_batch["pixel_values"])

    return {"stock": stock_pass, "ours": our_pass, "stock without loss": without_loss}


if __name__ == "__main__":
    main()
