"""Shared by the commands: messages, next steps, dataset options, and argument types."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from m2f_trainer.errors import M2FError, escape_controls


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
    """Add the dataset argument, and options for its annotation files and image folders."""
    parser.add_argument(
        "dataset", help="folder of a dataset, its annotation file or data.yaml, or user/name on the Hub"
    )
    add_file_options(parser)


def add_file_options(parser: argparse._ActionsContainer) -> None:
    """Where the annotations and images of a dataset are."""
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
    parser.add_argument(
        "--exif_frame",
        choices=["auto", "stored", "displayed"],
        default="auto",
        help="where masks of photos with an EXIF rotation lie: on the stored pixels, or on the photo as viewers "
        "display it [auto: decided by the annotated sizes]",
    )
    parser.add_argument(
        "--follow_links",
        action="store_true",
        help="read images that are links out of the dataset folder (DVC, git-annex); only for your own links",
    )
    add_limit_option(parser)


def add_limit_option(parser: argparse._ActionsContainer, larger: str = "larger ones are refused") -> None:
    """The option for the limit of pixels of an image; `larger` describes what happens to larger ones."""
    parser.add_argument(
        "--max_pixels",
        type=positive_int,
        metavar="N",
        help=f"highest number of pixels of an image; {larger} [89478485]",
    )


def add_range_option(parser: argparse.ArgumentParser, default: str) -> None:
    """How values of more than 8 bits are scaled; `default` describes what happens without the option."""
    parser.add_argument(
        "--pixel_range",
        type=pixel_range,
        metavar="LOW,HIGH",
        help="for images of more than 8 bits: the values that become black and white; image: percentiles of each image "
        f"[{default}]",
    )


def pixel_range(text: str) -> str:
    """An argparse type: auto, image, or two numbers as of the recipe field."""
    from m2f_trainer.config.arguments import parse_pixel_range

    try:
        parse_pixel_range(text)
    except M2FError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_precision_option(parser: argparse.ArgumentParser, automatic: str) -> None:
    """The precision of the model; `automatic` describes the value auto."""
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bf16"],
        default="auto",
        help=f"bf16: bfloat16 autocast, faster on GPUs since Ampere; auto: {automatic} [%(default)s]",
    )


def dataset_options(annotations: Sequence[str] | None, images: Sequence[str] | None, **others: str | None) -> str:
    """The options of `add_dataset_options` and others as part of a command, "" for none; "auto" is left out."""
    words = {name: [value] for name, value in others.items() if value and value != "auto"}
    given = (("annotations", annotations), ("images", images), *words.items())
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
