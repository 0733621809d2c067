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

from transformers import HfArgumentParser, PreTrainedConfig

from m2f_trainer.config.arguments import DataArguments, ModelArguments
from m2f_trainer.config.fields import Option, options_of
from m2f_trainer.config.training_arguments import STEP_MILESTONES, TrainArguments, default_backbone_multiplier
from m2f_trainer.config.typed_json import (
    describe_type,
    has_type,
    is_finite,
    leaves,
    parse_json,
    read_object,
    takes_object,
)
from m2f_trainer.errors import ModelFolderError, RecipeError, UsageError, check_model_path
from m2f_trainer.model.backbones import BACKBONES, find_row, is_pyramidal, read_config, stride_of
from m2f_trainer.model.mask2former import M2FConfig
from m2f_trainer.model.neck import smallest_side
from m2f_trainer.model.sources import load_config, with_floats
from m2f_trainer.run_folder import write_atomically

__all__ = ["DataArguments", "ModelArguments", "Recipe", "TrainArguments", "find_recipe", "load_recipe", "save_recipe"]

GROUPS = (ModelArguments, DataArguments, TrainArguments)

AUTO = "auto"
"""What some fields accept instead of a number (`Option.auto`); `training/auto.py` resolves it."""

RENAMED = {
    "model_name_or_path": "use backbone, and head_checkpoint for the head",
    "do_reduce_labels": "leave it out: the category ids of the file are mapped to classes automatically",
    "mixed_precision": "use bf16 or fp16",
    "warmup_ratio": "use warmup_steps, which below 1 is a fraction of the run",
    "num_warmup_steps": "use warmup_steps",
    "max_train_steps": "use max_steps",
    "config": "give the recipe as the first argument, without an option",
    "model": "use backbone",
    "trust_remote_code": "leave it out: code of a dataset or model is never run",
    "cache_dir": "set the environment variable HF_HOME instead",
    "streaming": "it was removed in this version; leave it out: Hub datasets are downloaded, or use max_train_samples",
}
"""Option names of other projects whose nearest name here would be wrong -> advice."""

REMOVED = {"streaming": False}
"""Removed fields -> the value at which they are ignored, since the recipes saved by earlier versions contain it."""


WORDS_OR_FILES = {"class_weights", "accelerator_config", "fsdp_config", "deepspeed"}
"""Fields of objects that also take a word, or the path of a JSON file."""

LOCAL_THEMES = (
    "checkpoints and resumption", "machine", "logs and uploads", "fixed or derived (not to be set)"
)  # fmt: skip
LOCAL_FIELDS = {
    "dataloader_pin_memory", "hub_revision", "hub_private_repo", "accelerator_config", "run_name", "project",
    "disable_tqdm", "logging_dir", "do_eval", "dataloader_prefetch_factor", "include_for_metrics",
}  # fmt: skip
"""Fields of transformers that, like those of LOCAL_THEMES, do not affect the model."""


LENGTHS = {
    "max_steps": ("max_minutes",),
    "max_minutes": ("max_steps",),
    "num_train_epochs": ("max_steps", "max_minutes"),
}
"""The fields that set the length of a run -> the others that would contradict or override them."""


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    model: ModelArguments
    data: DataArguments
    train: TrainArguments


def load_recipe(
    argv: Sequence[str],
    choose: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    find_resumed: Callable[[Mapping[str, Any]], Path | None] = lambda given: None,
) -> Recipe:
    """`[RECIPE.json] [--field value ...]` -> a checked recipe; options override the file.

    `choose`: where no file is named, it gets the options' values and returns further fields (default: none).
    `find_resumed`: it gets the values and returns the recipe of the checkpoint that they resume (default: a new run).

    Raises UsageError for an invalid option, RecipeError, or ModelFolderError where `init_from` names no model.
    """
    path = find_recipe(argv[0]) if argv and not argv[0].startswith("-") else None
    try:
        given = checked(OptionParser().given(argv if path is None else argv[1:]), "on the command line")
    except RecipeError as error:
        raise UsageError(str(error)) from error
    given = {**(kept_beside(given, read_recipe(path)) if path else {}), **given}
    given |= backbone_of_start(given, find_resumed)
    chosen = kept_beside(given, choose(given)) if choose and not path else {}
    return build_recipe({**chosen, **given})


def kept_beside(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that options leave in place.

    A length of the run replaces those of other kinds, a schedule the milestones that a saved recipe has for `step`, and
    `layer_decay` the multiplier that a saved recipe has by default.
    """
    replaced = {other for name, others in LENGTHS.items() if given.get(name) not in (None, -1) for other in others}
    kept = {name: value for name, value in recipe.items() if name not in replaced}
    if given.get("lr_scheduler_type", "step") != "step" and kept.get("lr_milestones") == STEP_MILESTONES:
        kept.pop("lr_milestones")
    default = default_backbone_multiplier(kept.get("layer_decay"))
    if "layer_decay" in given and kept.get("backbone_lr_multiplier") == default:
        kept.pop("backbone_lr_multiplier")
    return kept


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe file, typed. Raises RecipeError."""
    return checked(without_deletion(read_object(path), path), f"in {path}")


def backbone_of_start(
    values: Mapping[str, Any], find_resumed: Callable[[Mapping[str, Any]], Path | None]
) -> dict[str, Any]:
    """`backbone`, or `backbone_config` where it began with random weights, of the model that `init_from` names.

    Those of a resumed run come from the recipe of its checkpoint: the model may be gone.
    Empty if one of the two is given, for checkpoints of the original script, which keep their own, and beside a
    `head_checkpoint`, which contradicts `init_from`.

    Raises:
        ModelFolderError: there is no such model
    """
    start = values.get("init_from")
    if not start or any(values.get(name) for name in ("backbone", "backbone_config", "head_checkpoint")):
        return {}
    resumed = find_resumed(values)
    if resumed is not None:
        return {name: value for name, value in read_recipe(resumed).items() if name in ("backbone", "backbone_config")}
    check_model_path(start)
    try:
        config = load_config(start)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelFolderError(f"init_from: no model could be read from {start!r}: {first}") from error
    if not isinstance(config, M2FConfig):
        return {}
    if config.backbone_name:
        return {"backbone": config.backbone_name}
    return {"backbone_config": config.to_dict()["backbone_config"]}


def without_deletion(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values of a recipe file; RecipeError where they ask for the deletion of checkpoints.

    Recipes are shared; one must not delete files on another machine.
    """
    if values.get("overwrite_output_dir") not in (None, False):
        raise RecipeError(
            f"overwrite_output_dir in {path}: a recipe deletes no checkpoints. Remove it, and give "
            "--overwrite_output_dir true on the command line."
        )
    return values


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe with every field; `load_recipe` reads it back as an equal one."""
    values = {**vars(recipe.model), **vars(recipe.data), **recipe.train.to_dict()}
    values["debug"] = " ".join(values["debug"])
    left_out = {name for name, row in rows().items() if not row.saved}
    kept = {key: value for key, value in values.items() if key not in left_out}
    write_atomically(path, json.dumps(kept, indent=2, allow_nan=False) + "\n")


def model_fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a saved recipe that affect the model: this package's own, and those of transformers that were set.

    `backbone` is left out if `backbone_config` replaces it by a randomly initialised one.
    """
    kept = {}
    for one in (one for group in GROUPS for one in fields(group) if one.init and one.name not in LOCAL_FIELDS):
        row, value = rows().get(one.name), recipe.get(one.name)
        affects_model = row.theme not in LOCAL_THEMES if row else value != one.default
        if affects_model and value not in (None, []):
            kept[one.name] = value
    if "backbone_config" in kept:
        kept.pop("backbone", None)
    return kept


def find_recipe(name: str) -> Path:
    """The file `name`, or the recipe of that name shipped with the package. Raises RecipeError if there is neither."""
    package = Path(__file__).parents[1]
    folders = [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]
    for path in [Path(name), *(folder / f"{name.removesuffix('.json')}.json" for folder in folders)]:
        if path.is_file():
            return path
    shipped = sorted(path.stem for folder in folders for path in folder.glob("*.json"))
    raise RecipeError(f"No recipe {name!r}. Give the path of a JSON file, or one of: {', '.join(shipped)}.")


class OptionParser(HfArgumentParser):
    """HfArgumentParser that returns only the options that were given, and raises RecipeError instead of exiting."""

    def __init__(self) -> None:
        super().__init__(GROUPS, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
        for action in self._actions:
            action.default = argparse.SUPPRESS
            if NoneType in get_args(hints()[action.dest]) and callable(action.type):
                if action.choices:
                    action.choices = [*action.choices, "null"]  # None in `given`
                else:
                    action.type = word_or("null", action.type, None)
            if hints()[action.dest] == bool | None:
                action.nargs, action.const = "?", True
            if accepts_auto(action.dest) and callable(action.type):
                action.type = word_or(AUTO, action.type)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's, without the metadata that is not argparse's: HfArgumentParser passes all of a field's on."""
        settings.pop("option", None)
        return super().add_argument(*names, **settings)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options in `argv`, typed. Raises RecipeError if one is unknown, given twice or of the wrong type."""
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
        nullable = {name for name in vars(namespace) if NoneType in get_args(hints()[name])}
        return {
            name: None if name in nullable and value in ("null", [None]) else value
            for name, value in vars(namespace).items()
        }

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a value of the wrong type."""
        raise RecipeError(f"On the command line: {message}.")


def word_or(word: str, convert: Callable[[str], Any], *meaning: Any) -> Callable[[str], Any]:
    """`convert`, except that `word` is returned as it is, or as `meaning` if that is given."""

    @wraps(convert)
    def converted(text: str) -> Any:
        return [word, *meaning][-1] if text == word else convert(text)

    return converted


@cache
def hints() -> dict[str, Any]:
    """Field name -> type, for every field of the three dataclasses."""
    types = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
    return {one.name: types[one.name] for group in GROUPS for one in fields(group) if one.init}


@cache
def rows() -> dict[str, Option]:
    """Field name -> row, for every field that has one; the others are transformers' own."""
    return {name: row for group in GROUPS for name, row in options_of(group).items()}


def accepts_auto(name: str) -> bool:
    """Whether "auto" is a value of this field."""
    return name in rows() and rows()[name].auto


def refuse_unknown(name: str, where: str) -> NoReturn:
    """Raise RecipeError with the nearest valid name."""
    key, dashes = name.removeprefix("--").replace("-", "_"), "--" if name.startswith("--") else ""
    nearest = dashes + difflib.get_close_matches(key, hints(), n=1, cutoff=0.0)[0]
    advice = RENAMED.get(key, f"the nearest is {nearest}")
    raise RecipeError(f"Unknown option {name} {where}: {advice}.")


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with JSON strings of objects parsed. Raises RecipeError for unknown names and invalid values."""
    present = {key: value for key, value in values.items() if key not in REMOVED or value is not REMOVED[key]}
    for key in present:
        if key not in hints():
            refuse_unknown(key, where)
    return {key: checked_value(key, value, f"{key} {where}") for key, value in present.items()}


def checked_value(key: str, value: Any, where: str) -> Any:
    """The value, converted to the type of its field. Raises RecipeError for the wrong type, NaN, code and tokens."""
    if key == "hub_token" and value is not None:
        raise RecipeError(
            f"{where}: tokens are not accepted in a recipe or command. Set HF_TOKEN or run `hf auth login`."
        )
    if isinstance(value, str) and takes_object(hints()[key]):
        if value.lstrip().startswith("{"):
            value = parse_json(value, f"in {where}")
        elif key not in WORDS_OR_FILES:
            raise RecipeError(f'{where}: expected a JSON object, such as {{"name": 1}}, or null, got {value!r}.')
    if not is_finite(value):
        raise RecipeError(f"{where}: expected a finite number, got {value}.")
    for leaf in leaves(value):
        if isinstance(leaf, str) and leaf.endswith(".py"):
            raise RecipeError(f"{where}: got the Python file {leaf!r}; a recipe holds values, never code.")
    if key in rows() and type(value) is rows()[key].json_type:
        return str(value).lower()
    if accepts_auto(key) and value == AUTO:
        return value
    if not has_type(value, hints()[key]):
        raise RecipeError(f"{where}: expected {accepted_values(key)}, got {value!r}.")
    return with_floats(value, hints()[key])


def accepted_values(key: str) -> str:
    """The values that a field accepts, in words: 'a number or "auto"'."""
    return describe_type(hints()[key]) + (f' or "{AUTO}"' if accepts_auto(key) else "")


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Typed values -> the three dataclasses, checked against each other. Raises RecipeError."""
    try:
        model, data, train = OptionParser().parse_dict(dict(values))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise RecipeError(f"These options can't be used together or here: {error}") from error
    if not data.dataset_name:
        raise RecipeError("dataset_name is missing: give the folder of a dataset, as in --dataset_name my_coco.")
    multiple, least = backbone_stride(model), least_side(model)
    if data.tile_size and not {"image_height", "image_width"} & values.keys():
        data.image_height = data.image_width = max(-(-data.tile_size // multiple) * multiple, least)
    check_sides(data, multiple, least)
    return Recipe(model, data, train)


def backbone_stride(model: ModelArguments) -> int:
    """The number that both image sides must be a multiple of; 1 if it is unknown before the backbone is loaded."""
    config, row = _backbone_at_hand(model), find_row(model.backbone)
    return stride_of(config) if config else row.stride if row else 1


def backbone_layers(model: ModelArguments) -> int:
    """Layers of a ViT; 0 for other backbones, and where the number is unknown before the backbone is loaded."""
    config, row = _backbone_at_hand(model), find_row(model.backbone)
    if config:
        return 0 if is_pyramidal(config) else int(config.num_hidden_layers)
    return row.layers if row else 0


def _backbone_at_hand(model: ModelArguments) -> PreTrainedConfig | None:
    """The configuration of a backbone that is given by its fields or is on this machine; None for one on the Hub."""
    if isinstance(model.backbone_config, dict):
        return read_config(model.backbone_config)
    is_local = model.backbone not in BACKBONES and Path(model.backbone).exists()
    return read_config(model.backbone) if is_local else None


def least_side(model: ModelArguments) -> int:
    """The smallest image side; `backbone_stride` where the neck is that of a model to start from."""
    start = model.init_from or model.head_checkpoint
    head = model.head_config if isinstance(model.head_config, dict) else {}
    neck = str(head.get("neck") or model.neck or ("" if start else M2FConfig.neck))
    return smallest_side(neck, backbone_stride(model), is_vit=backbone_layers(model) > 0)


def check_sides(data: DataArguments, multiple: int, least: int) -> None:
    """Raise RecipeError unless both sides are multiples of `multiple`, from `least` on, and equal where there are
    tiles.
    """
    if data.tile_size and data.image_height != data.image_width:
        raise RecipeError(
            f"tile_size={data.tile_size}: tiles are square, and the frame that they fill is {data.image_height} x "
            f"{data.image_width}. Give image_height and image_width one value, or leave both out."
        )
    for name, side in (("image_height", data.image_height), ("image_width", data.image_width)):
        if side % multiple:
            below = side // multiple * multiple
            near = " or ".join(str(size) for size in (below, below + multiple) if size >= least) or str(least)
            raise RecipeError(f"{name}={side} is not a multiple of the backbone's {multiple}. The nearest are {near}.")
        if side < least:
            raise RecipeError(
                f"{name}={side}: expected at least {least}, two patches of the backbone, because the neck halves its "
                f"maps. Give {name}={least}, or neck plain."
            )
