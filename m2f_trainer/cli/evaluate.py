"""`m2f evaluate`: COCO metrics of a model on a dataset."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from m2f_trainer.cli.console import (
    add_dataset_options,
    add_precision_option,
    add_range_option,
    positive_int,
    say,
    suggest,
)

SUMMARY = "COCO mask and box AP of a model on a dataset"
DESCRIPTION = "Evaluate a model against a dataset's unmodified annotations, with the numbers of pycocotools."
EXAMPLES = (
    "m2f evaluate runs/first my_coco --split test",
    "m2f evaluate runs/first other_coco --output_dir scores    # with charts; m2f report reads the folder",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of a model")
    add_dataset_options(parser)
    add_range_option(parser, "as in the model's training")
    parser.add_argument(
        "--split",
        choices=["train", "valid", "test"],
        help="split to evaluate on [valid; of a dataset with one split that the model was not trained on: that one]",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="write metrics, predictions, charts and pictures to this folder"
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        metavar="N",
        help="images or tiles per batch [as in the model's training, or 4]",
    )
    add_precision_option(parser, "as in the model's training; of other models bf16 on GPUs that have it")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.evaluation.coco import metrics_table
    from m2f_trainer.masks.rle import allow_pixels
    from m2f_trainer.training.evaluate import evaluate_folder

    allow_pixels(arguments.max_pixels)

    metrics = evaluate_folder(
        arguments.model,
        arguments.dataset,
        arguments.split,
        arguments.output_dir,
        arguments.batch_size,
        arguments.annotations,
        arguments.images,
        arguments.exif_frame,
        arguments.pixel_range,
        arguments.precision,
        arguments.follow_links,
    )
    say(metrics_table(metrics, "eval_"))
    suggest(f"m2f predict {shlex.quote(arguments.model)} IMAGES")
