"""`m2f predict`: overlays and COCO results of a model for images and videos."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from m2f_trainer.cli.console import (
    add_limit_option,
    add_precision_option,
    add_range_option,
    natural_int,
    positive_int,
    say,
    suggest,
)

SUMMARY = "overlays and COCO results of a model for images and videos"
DESCRIPTION = (
    "Draw the predicted instances over images and videos, and write them as COCO results and as a CSV table. After an "
    "interruption, the same command continues where it stopped."
)
EXAMPLES = (
    "m2f predict runs/first photos/ --recursive",
    "m2f predict runs/first slide.tif --tile 1024",
    "m2f predict runs/first new/*.jpg --format coco_dataset    # drafts to correct in an annotation tool",
)


def threshold(text: str) -> float | Literal["auto"]:
    """An argparse type: a score from 0 to 1, or auto. argparse reports the ValueError."""
    if text == "auto":
        return "auto"
    score = float(text)
    if not 0 <= score <= 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number from 0 to 1, got {text!r}")
    return score


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of a model")
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="input", help="images, videos, folders, or patterns such as 'a/*.jpg'"
    )
    parser.add_argument("--recursive", action="store_true", help="include subfolders")
    parser.add_argument(
        "--threshold",
        type=threshold,
        metavar="SCORE",
        default="auto",
        help="minimum score of an instance; auto: the best of each class on the validation images of the training, or "
        "0.5 if the model has none [%(default)s]",
    )
    parser.add_argument("--batch_size", type=positive_int, metavar="N", default=4, help="images per batch [4]")
    add_range_option(parser, "as in the model's training")
    add_precision_option(parser, "bf16 on GPUs that have it")
    add_limit_option(
        parser,
        "larger ones are refused, except with tiles: these read a TIFF file window by window, and any other that half "
        "of the free memory can hold",
    )
    large = parser.add_argument_group(
        "tiles", "default: as in training. TIFF files are read window by window: pip install 'm2f-trainer[tiff]'"
    )
    large.add_argument(
        "--tile",
        type=natural_int,
        metavar="SIDE",
        help="predict in tiles of SIDE x SIDE pixels and merge instances across seams; best is the size of the "
        "training images or tiles; 0 predicts whole images",
    )
    large.add_argument(
        "--overlap",
        type=float,
        metavar="FRACTION",
        help="fraction of a tile's side shared with the next tile [as in training, or 0.3]",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, default=Path("predictions"), help="output folder [%(default)s]")
    output.add_argument(
        "--format",
        default="results",
        choices=["results", "coco_dataset"],
        help="coco_dataset also writes a COCO dataset with polygons, for CVAT or Label Studio; it takes no videos "
        "[%(default)s]",
    )


def run(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.inference.predict import PredictOptions, predict_folder
    from m2f_trainer.masks.rle import allow_pixels

    allow_pixels(arguments.max_pixels)
    options = PredictOptions(
        threshold=arguments.threshold,
        recursive=arguments.recursive,
        batch_size=arguments.batch_size,
        tile=arguments.tile,
        overlap=arguments.overlap,
        pixel_range=arguments.pixel_range,
        dataset=arguments.format == "coco_dataset",
        precision=arguments.precision,
    )
    results = predict_folder(arguments.model, arguments.inputs, arguments.output_dir, options)
    say(f"Overlays and predictions are in {results}.")
    model = shlex.quote(arguments.model)
    suggest(f"m2f export {model}", *[f"m2f push {model} NAME/MODEL"] * Path(arguments.model).is_dir())
