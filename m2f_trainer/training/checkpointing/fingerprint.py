"""Settings that affect results, compared on resume."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import TrainingArguments

from m2f_trainer.config.arguments import HEADS
from m2f_trainer.config.fields import options_of
from m2f_trainer.config.recipe import Recipe, rows
from m2f_trainer.data.dataset import Category
from m2f_trainer.data.reading import Reading

FIXED = {*(name for name, row in rows().items() if row.defines_model), "categories", "engine"}
"""A checkpoint cannot be resumed with another value of these: a new run can start from its weights, with init_from."""
SCORED_BY = frozenset({
    "valid_data", "image_height", "image_width", "tile_size", "eval_tile_size", "tile_overlap", "matrix_nms",
    "pixel_range", "exif_frame",
})  # fmt: skip
"""The same weights have other figures with another value of these."""


def fingerprint(
    recipe: Recipe, train: Dataset, valid: Dataset, categories: Sequence[Category], samples: int
) -> dict[str, Any]:
    """Settings that affect results, by name, as plain values; `samples` of an epoch are images or tiles."""
    values: dict[str, Any] = {}
    for group in (recipe.model, recipe.data, recipe.train):
        values |= {name: vars(group)[name] for name, row in options_of(type(group)).items() if row.changes_results}
    values |= recipe.data.augment()
    values["head"] = recipe.model.head or "original"  # as older versions recorded it
    values["neck"] = recipe.model.neck or HEADS[values["head"]]["neck"]
    values["world_size"] = recipe.train.world_size
    values["categories"] = [vars(category) for category in categories]
    values["engine"] = "fsdp" if recipe.train.fsdp else "deepspeed" if recipe.train.deepspeed else None
    values["train_images"] = samples
    values["train_data"] = annotations_digest(train)
    values["valid_data"] = annotations_digest(valid)
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def annotations_digest(rows: Dataset) -> str:
    """SHA-256 of a split's annotations; it does not depend on the path of its folder, or on how images are read."""
    total = hashlib.sha256()
    columns = [name for name in rows.column_names if name not in ("image", *Reading().columns())]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
            writer.write_table(table.replace_schema_metadata(None))
        total.update(sink.getvalue())
    return total.hexdigest()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text, for each setting that differs between two fingerprints.

    A field that one of them lacks counts as its `Option.before`.
    """
    defaults = {name: row.default if row.before is ... else row.before for name, row in rows().items()}
    changed = {}
    for name in sorted({*then, *now}):
        before, after = (facts.get(name, defaults.get(name)) for facts in (then, now))
        if before != after:
            changed[name] = f"{name} was {before!r}, is {after!r}"
    return changed


def has_other_optimizer(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the saved state of the optimizer doesn't fit: of another algorithm, or of other parameter groups."""
    algorithms = {str(facts.get("optim")).removesuffix("_fused") for facts in (then, now) if "optim" in facts}
    return len(algorithms) > 1 or (then.get("layer_decay") is None) is not (now.get("layer_decay") is None)


def updates_per_epoch(facts: Mapping[str, Any]) -> int:
    """Optimizer steps per epoch, counted as the Trainer does."""
    batches = facts["train_images"] / facts["per_device_train_batch_size"]
    rounded: Callable[[float], int] = math.floor if facts["dataloader_drop_last"] else math.ceil
    of_a_rank = rounded(rounded(batches) / facts["world_size"])
    return max(math.ceil(of_a_rank / int(facts["gradient_accumulation_steps"])), 1)


def length_in_steps(arguments: TrainingArguments, per_epoch: int) -> int:
    """Optimizer steps of a run without max_minutes, counted as the Trainer does, of `per_epoch` steps an epoch."""
    return arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)


def step_samples(facts: Mapping[str, Any]) -> int:
    """Samples per optimizer step."""
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    return int(math.prod(facts[name] for name in sizes))


def same_sample(step: int, then: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """The step of the changed run that has seen as many samples as `step` of the former one, to the nearest step."""
    epochs, within = divmod(step, updates_per_epoch(then))
    images, images_now = int(then["train_images"]), int(now["train_images"])
    seen = epochs * images + min(within * step_samples(then), images)
    epochs, rest = divmod(seen, images_now)
    return epochs * updates_per_epoch(now) + round(rest / step_samples(now))
