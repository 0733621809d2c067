"""`m2f train`: train from a recipe and options."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from m2f_trainer.cli.console import dataset_options, say, suggest

SUMMARY = "train from a recipe (JSON) and options"
DESCRIPTION = (
    "Train a model. Every recipe field is an option, which overrides the recipe; unknown options are errors. Without a "
    "recipe, the fields that are not given are chosen for the dataset and this machine, and printed with the reasons. "
    "A resumed run keeps the recipe of its checkpoint."
)
EXAMPLES = (
    "m2f train --dataset_name my_coco --max_minutes 30",
    "m2f train recipes/dinov3_vits16plus_1024.json --dataset_name my_coco --output_dir runs/first",
    "m2f train dinov3_vitl16_1024_lora --dataset_name my_coco --num_train_epochs auto --dry_run",
    "m2f train --output_dir runs/first --resume_from_checkpoint true",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Only --help and --dry_run; `config.recipe.load_recipe` parses the recipe and its fields."""
    parser.usage = "m2f train [RECIPE.json] [--field value ...]"
    parser.add_argument("-h", "--help", action="store_true", help="show this help and every recipe field")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print parameter groups, steps, learning rates, estimated memory and resolved values, without training",
    )
    parser.set_defaults(format_help=parser.format_help)


def run(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    if arguments.help:
        from m2f_trainer.config.field_help import help_of_fields

        say(f"{arguments.format_help()}\n{help_of_fields()}")
        return
    from m2f_trainer.config.recipe import load_recipe
    from m2f_trainer.training.checkpointing.resume import recipe_to_resume

    recipe = load_recipe(options, choose, recipe_to_resume)
    if arguments.dry_run:
        from m2f_trainer.training.run import dry_run

        say(dry_run(recipe))
        return
    from m2f_trainer.training.run import train

    train(recipe)
    folder, dataset = shlex.quote(str(recipe.train.output_dir)), shlex.quote(str(recipe.data.dataset_name))
    files = dataset_options(recipe.data.annotations, recipe.data.images, exif_frame=recipe.data.exif_frame)
    files += " --follow_links" * recipe.data.follow_links
    suggest(f"m2f evaluate {folder} {dataset}{files}", f"m2f predict {folder} IMAGES")


def choose(given: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe fields where no recipe is given: of the resumed run, otherwise for the dataset and this machine.

    Raises DataError, RecipeError.
    """
    from m2f_trainer.config.recipe import read_recipe
    from m2f_trainer.training.checkpointing.resume import recipe_to_resume, run_of

    resumed = recipe_to_resume(given)
    if resumed is not None:
        say(f"No recipe is given. The run goes on with that of its checkpoint, {resumed}")
        return {**read_recipe(resumed), "output_dir": str(run_of(resumed.parent))}
    if not given.get("dataset_name"):
        return {}
    from m2f_trainer.data.hub_dataset import load_recipe_dataset
    from m2f_trainer.data.validate import check_split
    from m2f_trainer.doctor.recommend import as_recipe, choices_text, facts_of, images_of_rows, recommend, this_machine

    splits = load_recipe_dataset(given)
    check_split(splits, "train")
    choices = recommend(facts_of(images_of_rows(splits["train"])), this_machine(), given)
    say(f"No recipe is given. Chosen for this dataset and machine:\n{choices_text(choices)}")
    return as_recipe(choices)
