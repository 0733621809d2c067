"""What each command takes: its options, help and example. Imports nothing heavy, so that help comes at once."""

import argparse
import textwrap
from pathlib import Path

from m2f_trainer.version import __version__

ABOUT = """\
Fine-tune Mask2Former on DINOv3 backbones for instance segmentation.

start
  demo       train, evaluate and predict on a small made-up dataset, in minutes
  check      look a COCO dataset over before training on it

train
  train      train from a recipe (JSON) and options
  evaluate   COCO mask and box AP of a model on a dataset
  report     one page about a run, or several compared

use
  predict    pictures and COCO results of a model for any images
  export     one ONNX or torch file of a model, compared with it on real images
  push       upload a model with its card to the Hugging Face Hub
"""

EXAMPLES = {
    "demo": ("m2f demo --output_dir runs/demo", "m2f demo --backbone dinov2-small"),
    "check": (
        "m2f check my_coco",
        "m2f check my_coco --html check.html --preview 8",
        "m2f check my_coco --fix corrected",
    ),
    "train": (
        "m2f train recipes/dinov3_vits16plus_1024.json --dataset_name my_coco --output_dir runs/first",
        "m2f train dinov3_vitl16_1024_lora --dataset_name my_coco --num_train_epochs auto --dry_run",
        "m2f train runs/first/recipe.json --resume_from_checkpoint auto",
    ),
    "evaluate": (
        "m2f evaluate runs/first my_coco --split test",
        "m2f evaluate runs/first other_coco --output_dir scores    # with charts, and what m2f report takes",
    ),
    "report": ("m2f report runs/first", "m2f report runs/first runs/second --output compared.html"),
    "predict": (
        "m2f predict runs/first photos/ --recursive --threshold 0.5",
        "m2f predict runs/first slide.tif --tile 1024",
        "m2f predict runs/first new/*.jpg --format coco_dataset    # drafts to correct in an annotation tool",
    ),
    "export": (
        "m2f export runs/first --format onnx --validation my_coco",
        "m2f export runs/first --half --output_dir export_half",
    ),
    "push": (
        "m2f push runs/first my-name/my-model --private",
        "m2f push runs/first my-name/my-model --pictures --dry_run",
    ),
}


def explain(command: argparse.ArgumentParser, name: str) -> None:
    """Put examples below a command's options, and break its description into lines."""
    command.description = textwrap.fill(command.description or "", 79)
    command.epilog = "examples:\n" + "\n".join(f"  {example}" for example in EXAMPLES[name])


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `train` leaves its options to the recipe."""
    parser = argparse.ArgumentParser(
        "m2f",
        description=ABOUT,
        epilog=f"m2f COMMAND --help tells more. A first run: {EXAMPLES['demo'][0]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"m2f_trainer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, help="one of the above")
    for name, add_options in OPTIONS.items():
        command = commands.add_parser(
            name,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=name != "train",
        )
        add_options(command)
        explain(command, name)
    return parser


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def demo_options(command: argparse.ArgumentParser) -> None:
    command.description = "Write a small made-up dataset, train on it, evaluate, and draw predictions."
    command.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where it all goes [%(default)s]")
    command.add_argument("--backbone", help="a pretrained one, such as dinov2-small, instead of a small random one")


def check_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Look a dataset over with all its images: figures, then what training would refuse (errors) and what should be"
        " looked at (warnings). Exit status: 0 no errors, 1 errors, 2 nothing in it can be used."
    )
    command.add_argument("dataset", help="folder of a COCO or YOLO dataset, or user/name on the Hub")
    output = command.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="write the result as JSON instead of text")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page with histograms and pictures too")
    output.add_argument("--fix", type=Path, metavar="FOLDER", help="write a corrected copy and a list of the changes")
    output.add_argument("--preview", type=count, metavar="N", help="draw N augmented training samples into preview/")
    output.add_argument(
        "--augmentation", default="lsj", choices=["none", "light", "lsj", "strong"], help="preset of --preview [lsj]"
    )
    model = command.add_argument_group("the model it is for", "objects are judged by its queries and input size")
    model.add_argument("--num_queries", type=count, metavar="N", default=100, help="queries of the model [%(default)s]")
    model.add_argument(
        "--image_height", type=count, metavar="N", default=1024, help="its input, in pixels [%(default)s]"
    )
    model.add_argument("--image_width", type=count, metavar="N", default=1024, help="[%(default)s]")


def train_options(command: argparse.ArgumentParser) -> None:
    command.description = "Train. Options are the recipe's fields and override it; unknown ones are errors."
    command.usage = "m2f train [RECIPE.json] [--field value ...]"
    command.add_argument("-h", "--help", action="store_true", help="show this and every field")
    command.add_argument("--dry_run", action="store_true", help="tell groups, memory, steps and rates, and stop there")


def evaluate_options(command: argparse.ArgumentParser) -> None:
    command.description = "Score a model against a dataset's untouched annotations, as pycocotools does."
    command.add_argument("model", help="folder or Hub id of a model")
    command.add_argument("dataset", help="folder of a COCO dataset")
    command.add_argument(
        "--split", default="valid", choices=["train", "valid", "test"], help="part of it [%(default)s]"
    )
    command.add_argument("--output_dir", type=Path, help="where metrics.json and predictions.json go")
    command.add_argument("--batch_size", type=count, metavar="N", default=4, help="images at once [%(default)s]")


def report_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Write one self-contained page about a run, or about several beside one another: its course, classes, errors,"
        " confusions, and its worst and best images with the truth beside the prediction."
    )
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints"
    )
    command.add_argument("--output", type=Path, default=Path("report.html"), help="the page [%(default)s]")


def predict_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Draw a model's instances over images and videos, and write them in COCO results form and as a table. Run again"
        " after an interruption, it goes on where it was."
    )
    command.add_argument("model", help="folder or Hub id of a model")
    command.add_argument(
        "inputs", nargs="+", type=Path, metavar="input", help="images, videos, folders, or patterns such as 'a/*.jpg'"
    )
    command.add_argument("--recursive", action="store_true", help="look into folders of folders too")
    command.add_argument(
        "--threshold", type=float, metavar="SCORE", default=0.5, help="lowest score that is kept [%(default)s]"
    )
    command.add_argument("--batch_size", type=count, metavar="N", default=4, help="images at once [%(default)s]")
    large = command.add_argument_group("large images", "TIFFs are read by windows (pip install 'm2f-trainer[tiff]')")
    large.add_argument(
        "--tile",
        type=count,
        metavar="SIDE",
        help="predict in tiles of SIDE pixels, merged across seams; best as large as the training images were",
    )
    large.add_argument(
        "--overlap", type=float, metavar="SHARE", default=0.2, help="share of a tile its neighbours see [%(default)s]"
    )
    output = command.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, default=Path("predictions"), help="where it goes [%(default)s]")
    output.add_argument(
        "--format",
        default="results",
        choices=["results", "coco_dataset"],
        help="coco_dataset writes a COCO dataset with polygons too, for CVAT or Label Studio [%(default)s]",
    )


def export_options(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Write a model as one file for other runtimes, with the constants to use it in a JSON beside it, and compare it"
        " with the model on validation images. Exit status: 0 parity met, 1 not."
    )
    command.add_argument("model", help="folder or Hub id of a model")
    file = command.add_argument_group("the file", "needs pip install 'm2f-trainer[export]'")
    file.add_argument("--format", default="onnx", choices=["onnx", "torch"], help="[%(default)s]")
    file.add_argument("--output_dir", type=Path, default=Path("export"), help="where the files go [%(default)s]")
    file.add_argument("--half", action="store_true", help="backbone and neck in float16")
    file.add_argument("--fixed_size", action="store_true", help="images of the model's own size only")
    parity = command.add_argument_group("the comparison")
    parity.add_argument("--validation", metavar="DATASET", help="compare on its valid split [the run's own dataset]")
    parity.add_argument("--images", type=count, default=16, metavar="N", help="images to compare on [%(default)s]")


def push_options(command: argparse.ArgumentParser) -> None:
    command.description = "Upload a model, its card and its licences. The token comes from HF_TOKEN or `hf auth login`."
    command.add_argument("model", type=Path, help="folder of a model")
    command.add_argument("repo_id", help="where to: name/model")
    where = command.add_argument_group("where to")
    where.add_argument("--private", action="store_true", help="make a new repository private")
    where.add_argument("--revision", metavar="BRANCH", help="commit to this branch, made where it isn't there")
    where.add_argument("--pull_request", action="store_true", help="propose the files in a pull request")
    what = command.add_argument_group("what")
    what.add_argument("--adapter_only", action="store_true", help="send a LoRA run's adapter, neck and head alone")
    what.add_argument(
        "--pictures",
        action="store_true",
        help="show validation images in the card, best and worst; without it no image of your data is sent",
    )
    what.add_argument("--dry_run", action="store_true", help="list the files and their sizes, and send nothing")


def subparser_help(name: str) -> str:
    """The help text of one command."""
    command = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    OPTIONS[name](command)
    explain(command, name)
    return command.format_help()


OPTIONS = {
    "demo": demo_options,
    "check": check_options,
    "train": train_options,
    "evaluate": evaluate_options,
    "report": report_options,
    "predict": predict_options,
    "export": export_options,
    "push": push_options,
}
