"""`m2f check`: examine a dataset before training on it."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2f_trainer.cli.console import add_dataset_options, add_range_option, dataset_options, positive_int, say, suggest
from m2f_trainer.errors import ArgumentError

if TYPE_CHECKING:
    from m2f_trainer.doctor.examine import Examination

SUMMARY = "examine a dataset before training on it, and repair a copy"
DESCRIPTION = (
    "Examine a dataset and all its images. Prints statistics, then errors, which training would reject, and warnings, "
    "which should be looked at. Exit status: 0 no errors, 1 errors, 2 nothing usable found."
)
EXAMPLES = (
    "m2f check my_coco",
    "m2f check my_coco --html check.html --preview 8",
    "m2f check my_coco --recipe my_recipe.json",
    "m2f check my_coco --fix corrected",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_dataset_options(parser)
    add_range_option(parser, "that of the training images")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    output.add_argument("--html", type=Path, metavar="FILE", help="also write a page with histograms and images")
    output.add_argument(
        "--recipe", type=Path, metavar="FILE", help="write a recipe for this dataset and this machine, with reasons"
    )
    output.add_argument("--fix", type=Path, metavar="FOLDER", help="write a corrected copy and a list of the changes")
    output.add_argument(
        "--remove_leaked",
        action="store_true",
        help="with --fix: of an image in two splits, remove the one in train, or in valid if the other is in test",
    )
    output.add_argument(
        "--preview", type=positive_int, metavar="N", help="draw N augmented training samples into preview/"
    )
    output.add_argument(
        "--augmentation",
        default="lsj",
        choices=["none", "light", "lsj", "strong"],
        help="augmentation preset of --preview [%(default)s]",
    )
    model = parser.add_argument_group(
        "the model to train",
        "its input and queries decide which objects it can find [what m2f train chooses]",
    )
    model.add_argument("--num_queries", type=positive_int, metavar="N", help="its number of queries")
    model.add_argument("--image_height", type=positive_int, metavar="N", help="height of its input [the width]")
    model.add_argument("--image_width", type=positive_int, metavar="N", help="width of its input [the height]")
    model.add_argument("--tile_size", type=positive_int, metavar="N", help="side of its tiles in pixels of the image")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    from m2f_trainer.doctor.examine import CLEAN, UNUSABLE, examine
    from m2f_trainer.doctor.fix import can_be_corrected, suggested_folder
    from m2f_trainer.doctor.model_input import given_fields
    from m2f_trainer.doctor.recommend import as_recipe, given_choices, this_machine
    from m2f_trainer.doctor.scan import Settings
    from m2f_trainer.doctor.summary import summary_text, to_json
    from m2f_trainer.masks.rle import allow_pixels

    if arguments.remove_leaked and arguments.fix is None:
        raise ArgumentError("--remove_leaked changes the copy that --fix writes. Give --fix FOLDER, too.")
    allow_pixels(arguments.max_pixels)
    settings = Settings(
        arguments.image_height,
        arguments.image_width,
        arguments.num_queries,
        arguments.exif_frame,
        arguments.pixel_range or "auto",
        arguments.follow_links,
        arguments.tile_size,
    )
    result = examine(arguments.dataset, settings, arguments.annotations, arguments.images, progress=True)
    say(to_json(result) if arguments.json else "\n\n".join(filter(None, (result.files, summary_text(result)))))
    messages = write_outputs(arguments, result)
    if not arguments.json:
        say("\n".join(messages))
        fixed = arguments.fix if result.status != UNUSABLE else None
        places = (None, None) if fixed else (arguments.annotations, arguments.images)
        files = dataset_options(*places, exif_frame=arguments.exif_frame, pixel_range=arguments.pixel_range)
        files += " --follow_links" * (arguments.follow_links and not fixed)
        files += f" --max_pixels {arguments.max_pixels}" * bool(arguments.max_pixels)
        dataset = shlex.quote(str(fixed or arguments.dataset)) + files
        if fixed or result.status == CLEAN:
            if arguments.recipe and result.status == CLEAN:
                suggest(f"m2f train {shlex.quote(str(arguments.recipe))} --dataset_name {dataset}")
            else:
                given = given_fields(settings)
                fields = {**given, **as_recipe(given_choices(given, this_machine()))}
                words = (f" --{name} {'null' if value is None else value}" for name, value in fields.items())
                suggest(f"m2f train --dataset_name {dataset}{''.join(words)}")
        elif can_be_corrected(result):
            suggest(f"m2f check {dataset} --fix {shlex.quote(str(suggested_folder(result)))}")
    return result.status


def write_outputs(arguments: argparse.Namespace, result: "Examination") -> list[str]:
    """Write the requested page, recipe, corrected copy and preview; return one message for each."""
    from m2f_trainer.doctor.examine import CLEAN, UNUSABLE
    from m2f_trainer.doctor.fix import repair
    from m2f_trainer.doctor.page import render
    from m2f_trainer.doctor.pictures import preview
    from m2f_trainer.run_folder import write_atomically

    messages = []
    if arguments.html:
        messages.append(f"page: {write_atomically(arguments.html, render(result))}")
    if arguments.recipe and result.status == CLEAN:
        messages.append(write_recipe(arguments.recipe, result))
    elif arguments.recipe:
        messages.append(f"no {arguments.recipe}: a recipe is written for a dataset without errors")
    if arguments.fix and result.status != UNUSABLE:
        done = repair(result, arguments.fix, arguments.remove_leaked)
        messages.append(f"corrected copy: {arguments.fix}, {len(done.changes)} change(s) listed in changes.json")
        messages.append(done.to_text())
    if arguments.preview and result.status != UNUSABLE:
        from m2f_trainer.config.arguments import DataArguments
        from m2f_trainer.training.prepare import train_transform

        data = DataArguments(
            augmentation=arguments.augmentation,
            image_height=result.seen.height,
            image_width=result.seen.width,
            tile_size=result.seen.tile_size,
        )
        paths = preview(result, arguments.preview, train_transform(data, seed=0), Path("preview"))
        messages.append(f"{len(paths)} augmented samples: {paths[0].parent}")
    return messages


def write_recipe(path: Path, result: "Examination") -> str:
    """Write the recipe for the training split and this machine, with the fields that are given; return them and the
    choices as text, with their reasons.
    """
    from m2f_trainer.doctor.model_input import given_fields
    from m2f_trainer.doctor.recommend import (
        as_recipe,
        choices_text,
        facts_of,
        given_choices,
        images_of_scans,
        recommend,
        this_machine,
    )
    from m2f_trainer.run_folder import write_json

    given, machine = given_fields(result.settings), this_machine()
    choices = given_choices(given, machine)
    facts = facts_of(images_of_scans(result.scans["train"]))
    choices += recommend(facts, machine, {**given, **as_recipe(choices)})
    write_json(path, as_recipe(choices))
    return f"recipe: {path}\n{choices_text(choices)}"
