"""Latency of one image, from an open photo to instances: `Predictor` compared with transformers' pipeline.

python -m benchmarks.predict --side 512 1024

Both sides have the same random weights and the same input size, and return every query as an instance (threshold 0).
The pipeline computes masks at 384 x 384 pixels and resizes them by nearest neighbour; ours are computed at full size.
"""

import argparse
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Mask2FormerImageProcessorPil, pipeline

from benchmarks.measure import alternate, compared, parser, report
from benchmarks.stock import BACKBONES, our_model, stock_model
from m2f_trainer.inference.predictor import Predictor


def main() -> None:
    """Measure each input size and print a table."""
    made = parser(__doc__ or "")
    made.add_argument("--backbone", default="vits16plus", choices=list(BACKBONES))
    made.add_argument("--side", type=int, nargs="+", default=[512, 1024], help="the model's input")
    made.add_argument("--size", default="480x640", help="HEIGHTxWIDTH of the photo")
    made.add_argument("--repeats", type=int, default=5)
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    report("Predict, one image", [measure(arguments, side) for side in arguments.side], arguments)


def measure(arguments: argparse.Namespace, side: int) -> dict[str, Any]:
    """One row."""
    ours = our_model(arguments.backbone, side)
    processor = Mask2FormerImageProcessorPil(size={"height": side, "width": side})
    stock = pipeline(
        "image-segmentation",
        model=stock_model(ours).to(arguments.device).eval(),
        image_processor=processor,
        device=arguments.device,
    )
    predictor, photo = Predictor(ours, arguments.device), synthetic_photo(arguments.size)
    runs = {
        "stock": lambda: stock(photo, subtask="instance", threshold=0.0),
        "ours": lambda: predictor(photo, threshold=0.0),
    }
    seconds = alternate(runs, arguments.repeats, arguments.device)
    return {"photo": arguments.size, "side": side, **compared(seconds, arguments.device)}


def synthetic_photo(size: str) -> Image.Image:
    """Smooth noise."""
    height, width = map(int, size.split("x"))
    noise = np.random.default_rng(0).integers(0, 255, size=(height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main()
