"""`m2f convert`: a checkpoint of the original training script as a model of this package."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from m2f_trainer.cli.console import say, suggest

SUMMARY = "a checkpoint of the original training script -> a model of this package"
DESCRIPTION = (
    "Load a checkpoint of the script DINOv3-Mask2former, on which this package is modelled, and save it as a model of "
    "this package with the same outputs. No code from its folder is run."
)
EXAMPLES = ("m2f convert output/best_model converted", "m2f convert step_200_model converted")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder with config.json, preprocessor_config.json and model.safetensors")
    parser.add_argument("output", type=Path, help="new folder for the converted model")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.errors import ModelFolderError, check_model_path
    from m2f_trainer.hub.licences import commercial_warning, licence_chain
    from m2f_trainer.model.mask2former import load_model
    from m2f_trainer.training.prepare import image_processor

    check_model_path(arguments.model)
    if arguments.output.exists():
        raise ModelFolderError(f"{arguments.output} exists already. Give a new folder.")
    model = load_model(arguments.model)
    model.save_pretrained(arguments.output)
    image_processor(model.config).save_pretrained(arguments.output)
    names = ", ".join(str(one["name"]) for one in (model.config.categories or [])[:20])
    say(f"{arguments.output}: {len(model.config.categories or [])} classes ({names}).")
    warning = commercial_warning(licence_chain(model.config.to_dict()))
    if warning is not None:
        say(warning)
    suggest(f"m2f predict {shlex.quote(str(arguments.output))} IMAGES")
