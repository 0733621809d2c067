"""`m2f demo`: train, evaluate and predict on a small synthetic dataset."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from m2f_trainer.cli.console import say, suggest

SUMMARY = "train, evaluate and predict on a small synthetic dataset, in minutes"
DESCRIPTION = "Write a small synthetic dataset, train on it, evaluate, and draw predictions."
EXAMPLES = ("m2f demo --output_dir runs/demo", "m2f demo --backbone dinov2-small")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="output folder [%(default)s]")
    parser.add_argument("--backbone", help="a pretrained backbone, such as dinov2-small, instead of a small random one")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.training.demo import demo

    demo(arguments.output_dir, arguments.backbone, say)
    suggest("m2f check my_coco", "m2f train --dataset_name my_coco --max_minutes 30 --output_dir runs/first")
