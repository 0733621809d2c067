"""`m2f export`: one file of a model for other runtimes, compared with the model."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from m2f_trainer.cli.console import add_file_options, positive_int, say, suggest

SUMMARY = "a model as an ONNX, OpenVINO, torch or AOTInductor file, compared with it on real images"
DESCRIPTION = (
    "Write a model for other runtimes, with a JSON file of the constants needed to use it, and compare it "
    "with the model on validation images. Exit status: 0 parity, 1 no parity."
)
EXAMPLES = (
    "m2f export runs/first --format onnx --validation my_coco",
    "m2f export runs/first --format openvino --int8 --validation my_coco --output_dir export_int8",
    "m2f export runs/first --half --output_dir export_half",
)
READING = ("annotations", "images", "exif_frame", "follow_links", "max_pixels")
"""Options that say how to read the validation dataset, which are fields of a recipe too."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of a model")
    file = parser.add_argument_group(
        "the file",
        "onnx needs pip install 'm2f-trainer[export]', openvino pip install 'm2f-trainer[openvino]', aotinductor a C++ "
        "compiler",
    )
    file.add_argument(
        "--format",
        default="onnx",
        choices=["onnx", "openvino", "torch", "aotinductor"],
        help="torch: a program of torch.export; aotinductor: the same compiled for CPUs like this one [%(default)s]",
    )
    file.add_argument("--output_dir", type=Path, default=Path("export"), help="output folder [%(default)s]")
    file.add_argument(
        "--half",
        action="store_true",
        help="backbone and neck in float16; openvino: all weights in float16, and the arithmetic that the device "
        "prefers, such as bfloat16",
    )
    file.add_argument(
        "--int8",
        action="store_true",
        help="8-bit integers in feed-forward layers of the backbone and in the pixel decoder, calibrated on validation "
        "images; needs --format openvino and pip install 'm2f-trainer[int8]'",
    )
    file.add_argument("--fixed_size", action="store_true", help="accept only images of the model's own size")
    file.add_argument(
        "--portable",
        action="store_true",
        help="without GridSample, which some runtimes lack or compute wrongly (see recipes/tensorrt.md)",
    )
    parity = parser.add_argument_group("the comparison")
    parity.add_argument(
        "--validation", metavar="DATASET", help="compare on the valid split of this dataset [the run's own dataset]"
    )
    add_file_options(parity)
    parity.add_argument(
        "--num_images", type=positive_int, default=16, metavar="N", help="number of images to compare on [%(default)s]"
    )


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    from m2f_trainer.errors import ArgumentError, DataError, check_model_path, needs
    from m2f_trainer.export.export import CONSTANTS, export_model
    from m2f_trainer.export.parity import FULL, HALF, INT8, check_export, recorded_dataset, validation_rows
    from m2f_trainer.export.quantize import calibration_frames
    from m2f_trainer.model.mask2former import load_model
    from m2f_trainer.run_folder import read_json

    if arguments.int8 and arguments.format != "openvino":
        raise ArgumentError(f"--int8 needs --format openvino, got --format {arguments.format}.")
    if arguments.int8:
        needs("nncf", extra="int8")
    check_model_path(arguments.model)
    limits = INT8 if arguments.int8 else HALF if arguments.half else FULL
    model, calibration = load_model(arguments.model), None
    dataset = recorded_dataset(Path(arguments.model))
    given = {name: vars(arguments)[name] for name in READING}
    if arguments.validation:
        dataset = {"dataset_name": arguments.validation, **given}
    elif named := [f"--{name}" for name, value in given.items() if value not in (None, False, "auto")]:
        raise DataError(
            f"{', '.join(named)} without --validation DATASET, which they are about: give it, or leave them out."
        )
    if arguments.int8 and dataset is None:
        raise DataError("--int8 is calibrated on the images of a dataset: give --validation DATASET.")
    rows = None if dataset is None else validation_rows(model.config, dataset)  # before the file: it may be refused
    if arguments.int8 and rows is not None:
        calibration = calibration_frames(model, rows, arguments.num_images)
        say(f"int8: calibrated on {len(calibration)} images or tiles of the valid split.")
    path = export_model(
        model,
        arguments.format,
        arguments.output_dir,
        half=arguments.half,
        fixed_size=arguments.fixed_size,
        portable=arguments.portable,
        calibration=calibration,
    )
    files = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    size = sum(file.stat().st_size for file in files) / 1e6
    say(f"{' and '.join(map(str, files))}: {size:.1f} MB. {path.with_name(CONSTANTS)} describes how to use it.")
    constants = read_json(path.with_name(CONSTANTS))
    if "runs_on" in constants:
        say(f"It runs on: {constants['runs_on']}. It contains machine code: load it only from sources that you trust.")
    if left := constants.get("int8", {}).get("left_in_float"):
        say(f"int8: left in float, since their errors move masks or ranks: {', '.join(left)}.")
    if rows is None:
        say("No --validation dataset: compared on synthetic images, where AP is meaningless.")
    reference = load_model(arguments.model)
    parity = check_export(reference, path, rows, arguments.num_images, limits, arguments.fixed_size)
    say(parity.to_text())
    if parity.met:
        suggest(f"python recipes/predict_exported.py {shlex.quote(str(path))} IMAGE")
    return 0 if parity.met else 1
