"""Recipes: plain JSON and command-line options -> three dataclasses, and back.

    recipe = load_recipe(["recipes/quickstart.json", "--dataset_name", "my_coco", "--learning_rate", "2e-4"])
    save_recipe(recipe, Path("runs/my_run/recipe.json"))        # load_recipe(["runs/my_run/recipe.json"]) == recipe

A recipe holds values only: it can't name code, and it never holds a token.
"""

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, wraps
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

from m2f_trainer.config.arguments import DataArguments, ModelArguments
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.config.typed_json import describe, is_a, is_finite, leaves, parse, read_object, takes_object
from m2f_trainer.errors import RecipeError
from m2f_trainer.model.backbones import BACKBONES, read_config, stride_of

__all__ = ["DataArguments", "ModelArguments", "Recipe", "TrainArguments", "find_recipe", "load_recipe", "save_recipe"]

GROUPS = (ModelArguments, DataArguments, TrainArguments)

NOT_SAVED = {"save_strategy", "save_steps", "eval_strategy", "eval_steps", "hub_token", "local_rank"}
"""Fields that follow from checkpointing_steps, or belong to one person or process."""

TEXT_OR_MORE: dict[str, type] = {"checkpointing_steps": int, "resume_from_checkpoint": bool}
"""Fields that are text on a command line, and may be of this type too in JSON."""

AUTO, AUTOMATIC = "auto", ("learning_rate", "per_device_train_batch_size", "num_train_epochs")
"""Fields that may be this word instead of a number; `training.automatic` resolves it."""

RENAMED = {
    "model_name_or_path": "use backbone, and head_checkpoint for the head",
    "do_reduce_labels": "leave it out: category ids of the file are mapped to classes by themselves",
    "mixed_precision": "use bf16 or fp16",
    "warmup_ratio": "use warmup_steps, which below 1 is a share of the run",
    "num_warmup_steps": "use warmup_steps",
    "max_train_steps": "use max_steps",
    "config": "name the recipe first, without an option",
    "model": "use backbone",
    "trust_remote_code": "leave it out: no code of a dataset or model is run",
    "cache_dir": "set the environment variable HF_HOME instead",
    "streaming": "it was removed in this version; leave it out: Hub datasets are downloaded, or use max_train_samples",
}
"""Names from elsewhere that no likeness leads to -> what to do."""

REMOVED = {"streaming": False}
"""Fields of earlier versions, which saved recipes may still hold at this value -> the value, which is ignored."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    model: ModelArguments
    data: DataArguments
    train: TrainArguments


def load_recipe(argv: Sequence[str]) -> Recipe:
    """`[RECIPE.json] [--field value ...]` -> a checked recipe; options override the file. Raises RecipeError."""
    if argv and not argv[0].startswith("-"):
        path, options = find_recipe(argv[0]), argv[1:]
        written = checked(read_object(path), f"in {path}")
    else:
        written, options = {}, argv
    given = checked(OptionParser().given(options), "on the command line")
    return build({**written, **given})


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every field included, for `load_recipe` to read back as an equal one."""
    training: dict[str, Any] = recipe.train.to_dict()  # type: ignore[no-untyped-call]
    values = {**vars(recipe.model), **vars(recipe.data), **training}
    values["debug"] = " ".join(values["debug"])
    kept = {key: value for key, value in values.items() if key not in NOT_SAVED}
    path.write_text(json.dumps(kept, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def find_recipe(name: str) -> Path:
    """The file `name`, or the recipe of that name that comes with the package. Raises RecipeError."""
    package = Path(__file__).parents[1]
    folders = [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]
    for path in [Path(name), *(folder / f"{name.removesuffix('.json')}.json" for folder in folders)]:
        if path.is_file():
            return path
    shipped = sorted(path.stem for folder in folders for path in folder.glob("*.json"))
    raise RecipeError(f"No recipe {name!r}. Give the path of a JSON file, or one of: {', '.join(shipped)}.")


class OptionParser(HfArgumentParser):
    """HfArgumentParser that returns only what was given, and raises RecipeError where argparse would exit."""

    def __init__(self) -> None:
        super().__init__(GROUPS, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
        for action in self._actions:
            action.default = argparse.SUPPRESS
            if NoneType in get_args(hints()[action.dest]) and callable(action.type):
                action.type = word_or("null", action.type, None)
            if hints()[action.dest] == bool | None:
                action.nargs, action.const = "?", True
            if action.dest in AUTOMATIC and callable(action.type):
                action.type = word_or(AUTO, action.type)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options in `argv`, typed. Raises RecipeError on unknown, duplicate and ill-typed ones."""
        fields_of = {name: action.dest for action in self._actions for name in action.option_strings}
        seen: set[str] = set()
        for name in [token.split("=")[0] for token in argv if token.startswith("--")]:
            field = fields_of.get(name) or refuse_unknown(name, "on the command line")
            if field in seen:
                raise RecipeError(f"--{field} is given twice on the command line. Keep one of them.")
            seen.add(field)
        namespace, rest = self.parse_known_args(list(argv))
        if rest:
            raise RecipeError(f"Expected --option value, got {rest[0]!r} on the command line.")
        return vars(namespace)

    def error(self, message: str) -> NoReturn:
        """Where argparse goes with a value of the wrong type."""
        raise RecipeError(f"On the command line: {message}.")


def word_or(word: str, convert: Callable[[str], Any], *meaning: Any) -> Callable[[str], Any]:
    """`convert`, but one word stands for itself, or for a meaning."""

    @wraps(convert)
    def converted(text: str) -> Any:
        return [word, *meaning][-1] if text == word else convert(text)

    return converted


@cache
def hints() -> dict[str, Any]:
    """Every field's type, by name."""
    types = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
    return {one.name: types[one.name] for group in GROUPS for one in fields(group) if one.init}


def refuse_unknown(name: str, where: str) -> NoReturn:
    """Raise RecipeError that names the nearest valid key."""
    key, dashes = name.removeprefix("--").replace("-", "_"), "--" if name.startswith("--") else ""
    nearest = dashes + difflib.get_close_matches(key, hints(), n=1, cutoff=0.0)[0]
    advice = RENAMED.get(key, f"the nearest is {nearest}")
    raise RecipeError(f"Unknown option {name} {where}: {advice}.")


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with JSON text made objects. Raises RecipeError on a key or a value that no field takes."""
    present = {key: value for key, value in values.items() if key not in REMOVED or value is not REMOVED[key]}
    return {key: checked_value(key, value, f"{key} {where}") for key, value in present.items() if known(key, where)}


def known(key: str, where: str) -> bool:
    """True, or RecipeError where no field has that name."""
    return key in hints() or refuse_unknown(key, where)


def checked_value(key: str, value: Any, where: str) -> Any:
    """A value of the field's type, finite, free of code and tokens. Raises RecipeError."""
    if key == "hub_token" and value is not None:
        raise RecipeError(f"{where}: tokens belong in no recipe or command. Set HF_TOKEN or run `hf auth login`.")
    if isinstance(value, str) and value.startswith("{") and takes_object(hints()[key]):
        value = parse(value, f"in {where}")
    if not is_finite(value):
        raise RecipeError(f"{where}: expected a finite number, got {value}.")
    for leaf in leaves(value):
        if isinstance(leaf, str) and leaf.endswith(".py"):
            raise RecipeError(f"{where}: got the Python file {leaf!r}; a recipe holds values, never code.")
    if key in TEXT_OR_MORE and type(value) is TEXT_OR_MORE[key]:
        return str(value).lower()
    if key in AUTOMATIC and value == AUTO:
        return value
    if not is_a(value, hints()[key]):
        raise RecipeError(f"{where}: expected {describe_field(key)}, got {value!r}.")
    return value


def describe_field(key: str) -> str:
    """What a field takes, in a user's words."""
    return describe(hints()[key]) + (f' or "{AUTO}"' if key in AUTOMATIC else "")


def build(values: Mapping[str, Any]) -> Recipe:
    """Typed values -> the three dataclasses, checked against each other. Raises RecipeError."""
    try:
        model, data, train = OptionParser().parse_dict(dict(values))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise RecipeError(f"These options can't be used together or here: {error}") from error
    if not data.dataset_name:
        raise RecipeError("dataset_name is missing: give the folder of a COCO dataset, as in --dataset_name my_coco.")
    check_sides(data, required_multiple(model))
    return Recipe(model, data, train)


def required_multiple(model: ModelArguments) -> int:
    """What both image sides must be a multiple of; 1 where only the loaded backbone can tell."""
    if isinstance(model.backbone_config, dict):
        return stride_of(read_config(model.backbone_config))
    if model.backbone in BACKBONES:
        return BACKBONES[model.backbone].stride
    return stride_of(read_config(model.backbone)) if Path(model.backbone).is_dir() else 1


def check_sides(data: DataArguments, multiple: int) -> None:
    """Raise RecipeError with the nearest valid sizes unless both sides are multiples of `multiple`."""
    for name, side in (("image_height", data.image_height), ("image_width", data.image_width)):
        if side % multiple:
            below = side // multiple * multiple
            near = " or ".join(str(size) for size in (below, below + multiple) if size > 0)
            raise RecipeError(f"{name}={side} is no multiple of the backbone's {multiple}. The nearest are {near}.")
