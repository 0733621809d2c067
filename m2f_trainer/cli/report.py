"""`m2f report`: a page about one run, or several compared."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from m2f_trainer.cli.console import say, suggest

SUMMARY = "one page about a run, or several compared"
DESCRIPTION = (
    "Write one self-contained page about a run, or about several side by side: training curves, metrics per class, "
    "error types, confusions, and the worst and best images with ground truth and prediction."
)
EXAMPLES = ("m2f report runs/first", "m2f report runs/first runs/second --output compared.html")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="file to write [%(default)s]")
    parser.add_argument(
        "--images",
        action="store_true",
        help="draw more images, from the datasets that the runs' recipes name; only for runs that you trust",
    )


def run(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.evaluation.report import write_report

    say(f"page: {write_report(arguments.runs, arguments.output, arguments.images)}")
    models = [run for run in arguments.runs if (run / "config.json").is_file()]
    if models:
        suggest(f"m2f predict {shlex.quote(str(models[0]))} IMAGES")
