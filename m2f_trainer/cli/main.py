"""The `m2f` command: one function a command, each of which imports what it needs and ends by telling the next step."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2f_trainer.cli.options import EXAMPLES, build_parser, subparser_help
from m2f_trainer.errors import M2FError, RunStopped

if TYPE_CHECKING:
    from m2f_trainer.doctor.examine import Examination


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    The exit status is 0; 1 after an error with advice; 2 after wrong usage; 75 where a signal stopped a training that
    can be resumed, so that a scheduler can queue it again; 130 after Ctrl-C elsewhere; 141 where the reader of
    its output has left.
    """
    parser = build_parser()
    arguments, options = parser.parse_known_args(argv)
    if options and arguments.command != "train":
        parser.error(f"{arguments.command} takes no {options[0]}; see m2f {arguments.command} --help")
    bars_on_terminals_only()
    escape_what_cannot_be_printed()
    try:
        status = COMMANDS[arguments.command](arguments, options)
        sys.stdout.flush()
        leave_together()
    except RunStopped as stop:
        say(f"m2f {arguments.command}: {stop}", stream="error")
        leave_together()
        return stop.status
    except KeyboardInterrupt:
        say("Interrupted.", stream="error")
        return 130
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail once more at its exit
        return 141
    except Exception as error:
        if not is_advice(error):
            raise
        say(f"m2f {arguments.command}: {error}", stream="error")
        return 1
    return status or 0


def demo(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.training.demo import demo as run_demo

    run_demo(arguments.output_dir, arguments.backbone, say)
    advise("m2f check my_coco", *EXAMPLES["train"][:1])


def check(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    from m2f_trainer.doctor.examine import UNUSABLE, examine
    from m2f_trainer.doctor.scan import Settings
    from m2f_trainer.doctor.summary import to_json, to_text

    settings = Settings(arguments.image_height, arguments.image_width, arguments.num_queries)
    result = examine(arguments.dataset, settings)
    say(to_json(result) if arguments.json else to_text(result))
    written = write_check(arguments, result)
    if not arguments.json:
        say("\n".join(written))
        fixed = arguments.fix if result.status != UNUSABLE else None
        name = shlex.quote(str(fixed or arguments.dataset))
        train_it = f"m2f train dinov3_vits16plus_1024 --dataset_name {name}"
        mend_it = f"m2f check {name}" + " --fix corrected" * (result.status != UNUSABLE)
        advise(train_it if fixed or not result.status else mend_it)
    return result.status


def write_check(arguments: argparse.Namespace, result: "Examination") -> list[str]:
    """Write what was asked for beside the text: page, corrected copy, pictures. Return what to say about it."""
    from m2f_trainer.doctor.examine import UNUSABLE
    from m2f_trainer.doctor.fix import repair
    from m2f_trainer.doctor.page import render
    from m2f_trainer.doctor.pictures import preview
    from m2f_trainer.viz.html import write_page

    told = []
    if arguments.html:
        told.append(f"page: {write_page(arguments.html, render(result))}")
    if arguments.fix and result.status != UNUSABLE:
        changes = repair(result, arguments.fix)
        told.append(f"corrected copy: {arguments.fix}, {len(changes)} change(s) listed in changes.json")
    if arguments.preview and result.status != UNUSABLE:
        from m2f_trainer.config.arguments import DataArguments
        from m2f_trainer.data.transforms import TrainTransform

        augment = DataArguments(augmentation=arguments.augmentation).augment()
        flip, size = augment.pop("horizontal_flip"), (arguments.image_height, arguments.image_width)
        paths = preview(result, arguments.preview, TrainTransform(*size, flip=flip, **augment), Path("preview"))
        told.append(f"{len(paths)} augmented samples: {paths[0].parent}")
    return told


def train(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    if arguments.help:
        from m2f_trainer.config.field_help import help_of_fields

        say(f"{subparser_help('train')}\n{help_of_fields()}")
        return
    from m2f_trainer.config.recipe import load_recipe

    recipe = load_recipe(options)
    if arguments.dry_run:
        from m2f_trainer.training.run import dry_run

        say(dry_run(recipe))
        return
    from m2f_trainer.training.run import train as run_training

    run_training(recipe)
    folder = shlex.quote(str(recipe.train.output_dir))
    advise(f"m2f evaluate {folder} {shlex.quote(str(recipe.data.dataset_name))}", f"m2f predict {folder} IMAGES")


def evaluate(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.evaluation.coco import metrics_table
    from m2f_trainer.training.evaluate import evaluate_folder

    metrics = evaluate_folder(
        arguments.model, arguments.dataset, arguments.split, arguments.output_dir, arguments.batch_size
    )
    say(metrics_table(metrics, "eval_"))
    advise(f"m2f predict {shlex.quote(arguments.model)} IMAGES")


def report(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.evaluation.report import write_report

    say(f"page: {write_report(arguments.runs, arguments.output)}")
    advise(f"m2f predict {shlex.quote(str(arguments.runs[0]))} IMAGES")


def predict(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.inference.predict import Options, predict_folder

    options = Options(
        threshold=arguments.threshold,
        recursive=arguments.recursive,
        batch_size=arguments.batch_size,
        tile=arguments.tile,
        overlap=arguments.overlap,
        dataset=arguments.format == "coco_dataset",
    )
    results = predict_folder(arguments.model, arguments.inputs, arguments.output_dir, options)
    say(f"Pictures and predictions are in {results}.")
    model = shlex.quote(arguments.model)
    advise(f"m2f export {model}", *[f"m2f push {model} NAME/MODEL"] * Path(arguments.model).is_dir())


def export(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    from m2f_trainer.export.export import CONSTANTS, export_model
    from m2f_trainer.export.parity import FULL, HALF, check_export, dataset_of
    from m2f_trainer.model.mask2former import load_model

    model, limits = load_model(arguments.model), HALF if arguments.half else FULL
    dataset = arguments.validation or dataset_of(Path(arguments.model))
    path = export_model(
        model, arguments.format, arguments.output_dir, half=arguments.half, fixed_size=arguments.fixed_size
    )
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB. {path.with_name(CONSTANTS)} says how to use it.")
    if dataset is None:
        say("No --validation dataset: compared on made-up images, whose AP says nothing.")
    reference = load_model(arguments.model)
    parity = check_export(reference, path, dataset, arguments.images, limits, arguments.fixed_size)
    say(parity.to_text())
    if arguments.format == "onnx":
        advise(f"python recipes/onnx_predict.py {shlex.quote(str(path))} IMAGE")
    return 0 if parity.met else 1


def push(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from m2f_trainer.hub import upload

    options = ("private", "revision", "pull_request", "adapter_only", "pictures")
    named = {name: vars(arguments)[name] for name in options}
    target = upload.Target(arguments.repo_id, **named)
    if arguments.dry_run:
        for name, size in upload.listing(arguments.model, target):
            say(f"{'yet to come' if size is None else f'{size:,}':>15}  {name}")
        return
    address = upload.push(arguments.model, target)
    say(f"Uploaded to {address}.")
    advise(f"m2f predict {shlex.quote(arguments.repo_id)} IMAGES")


COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str]], int | None]] = {
    "demo": demo,
    "check": check,
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "predict": predict,
    "export": export,
    "push": push,
}


def bars_on_terminals_only() -> None:
    """Where messages go to a file, switch the libraries' progress bars off, before they are imported."""
    if not sys.stderr.isatty():
        for library in ("HUB", "DATASETS"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")


def escape_what_cannot_be_printed() -> None:
    """A class or file name that the output's encoding lacks ends no command: Windows' has few, UTF-8 no odd bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def leave_together() -> None:
    """End what binds this process to other ranks, if any; a rank that fails does not, since the others may be stuck."""
    rendezvous = sys.modules.get("m2f_trainer.distributed")
    if rendezvous is not None:
        rendezvous.leave()


def is_advice(error: Exception) -> bool:
    """Whether its message is for the user: ours, the lone model package's, or the system's (a full disk), numbered."""
    backbones = sys.modules.get("m2f_trainer.model.backbones")
    refused = isinstance(error, OSError) and error.errno is not None
    return isinstance(error, M2FError) or refused or (backbones is not None and isinstance(error, backbones.ModelError))


def advise(*commands: str) -> None:
    """Tell what to do next."""
    say("\n".join(["", "Next:", *(f"  {command}" for command in commands)]))


def say(text: str, stream: str = "output") -> None:
    """Print; of several processes only the first speaks, but each tells its own errors."""
    rank = os.environ.get("RANK", "0")
    if stream == "error":
        print(text if rank == "0" else f"[rank {rank}] {text}", file=sys.stderr)
    elif rank == "0":
        print(text)
