"""`m2f push`: upload a model to the Hugging Face Hub."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from m2f_trainer.cli.console import say, suggest

SUMMARY = "upload a model with its card to the Hugging Face Hub"
DESCRIPTION = "Upload a model, its card and its licences. The token is read from HF_TOKEN or `hf auth login`."
EXAMPLES = (
    "m2f push runs/first my-name/my-model --private",
    "m2f push runs/first my-name/my-model --pictures --dry_run",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("repo_id", help="repository to upload to: name/model")
    where = parser.add_argument_group("repository")
    where.add_argument("--private", action="store_true", help="if the repository is new, make it private")
    where.add_argument("--revision", metavar="BRANCH", help="commit to this branch, created if it doesn't exist")
    where.add_argument("--pull_request", action="store_true", help="open a pull request instead of committing")
    what = parser.add_argument_group("files")
    what.add_argument(
        "--adapter_only", action="store_true", help="of a LoRA run, upload only the adapter with neck and head"
    )
    what.add_argument(
        "--pictures",
        action="store_true",
        help="show the best and worst validation images in the card; by default none of your images is uploaded",
    )
    what.add_argument("--dry_run", action="store_true", help="list the files and their sizes without uploading")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.hub import upload

    options = ("private", "revision", "pull_request", "adapter_only", "pictures")
    target = upload.Target(arguments.repo_id, **{name: vars(arguments)[name] for name in options})
    if arguments.dry_run:
        for name, size in upload.planned_files(arguments.model, target):
            say(f"{'to be written' if size is None else f'{size:,}':>15}  {name}")
        return
    say(f"Uploaded to {upload.push(arguments.model, target)}.")
    suggest(f"m2f predict {shlex.quote(arguments.repo_id)} IMAGES")
