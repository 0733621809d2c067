"""What the commands share: messages, next steps, and an argument type."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from m2f_trainer.errors import escape_controls


def say(text: str, stream: str = "output") -> None:
    """Print on the main process; an error is printed on every process, with the rank.

    Control characters, which names of files and classes may contain, are printed as escapes.
    """
    rank, text = os.environ.get("RANK", "0"), escape_controls(text, kept="\n\t")
    if stream == "error":
        print(text if rank == "0" else f"[rank {rank}] {text}", file=sys.stderr)
    elif rank == "0":
        print(text)


def suggest(*commands: str) -> None:
    """Print the commands to run next."""
    say("\n".join(["", "Next:", *(f"  {command}" for command in commands)]))


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """The dataset of a command, and where its annotations and images are if that can't be found."""
    parser.add_argument(
        "dataset", help="folder of a dataset, its annotation file or data.yaml, or user/name on the Hub"
    )
    parser.add_argument(
        "--annotations",
        nargs="+",
        metavar="SPLIT=FILE",
        help="annotation file of each split, relative to the dataset folder [those found]",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="SPLIT=FOLDER",
        help="image folder of splits, relative to the dataset folder [those found]",
    )


def dataset_options(annotations: Sequence[str] | None, images: Sequence[str] | None) -> str:
    """The options of `add_dataset_options` as part of a command, "" for none."""
    given = (("annotations", annotations), ("images", images))
    return "".join(f" --{name} {shlex.join(values)}" for name, values in given if values)


def natural_int(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
