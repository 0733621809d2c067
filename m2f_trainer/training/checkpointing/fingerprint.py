"""What decides a run's numbers, as plain values: they must be the same when it is resumed."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from m2f_trainer.config.recipe import Recipe

MODEL_FIELDS = (
    "backbone", "neck", "tune", "num_queries", "pyramid_taps", "lora_rank", "lora_alpha", "lora_dropout",
    "lora_targets", "drop_path", "rope_rescale", "backbone_config", "head_config",
)  # fmt: skip
DATA_FIELDS = ("image_height", "image_width", "min_instance_area")
TRAIN_FIELDS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "data_seed", "learning_rate",
    "weight_decay", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs",
    "max_steps", "optim", "bf16", "fp16", "backbone_lr_multiplier", "layer_decay", "head_first_steps", "lr_milestones",
    "ema_decay", "dataloader_drop_last",
)  # fmt: skip
FIXED = {*MODEL_FIELDS, "categories", "engine"}
"""What no checkpoint can be carried over to: another model, or sharding, starts a new run, with init_from."""


def fingerprint(recipe: Recipe, train: Dataset, valid: Dataset, categories: Sequence[Any]) -> dict[str, Any]:
    """Everything that decides the numbers of a run, as plain values by name."""
    world = {"world_size": recipe.train.world_size}
    values = {name: vars(recipe.model)[name] for name in MODEL_FIELDS}
    values |= {name: vars(recipe.data)[name] for name in DATA_FIELDS} | recipe.data.augment()
    values |= {name: ({**vars(recipe.train), **world})[name] for name in TRAIN_FIELDS}
    values["categories"] = [vars(category) for category in categories]
    values["engine"] = "fsdp" if recipe.train.fsdp else "deepspeed" if recipe.train.deepspeed else None
    values["feature_cache"] = recipe.model.feature_cache
    values["train_images"] = len(train)
    values["train_data"] = digest_of(train)
    values["valid_data"] = digest_of(valid)
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def digest_of(rows: Dataset) -> str:
    """SHA-256 of a split's annotations, wherever its folder lies."""
    total = hashlib.sha256()
    columns = [name for name in rows.column_names if name != "image"]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
            writer.write_table(table.replace_schema_metadata(None))
        total.update(sink.getvalue())
    return total.hexdigest()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two fingerprints, told by name."""
    return {
        name: f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    }


def updates_an_epoch(facts: Mapping[str, Any]) -> int:
    """Optimiser steps an epoch, counted as the Trainer does."""
    batches = facts["train_images"] / facts["per_device_train_batch_size"]
    rounded: Callable[[float], int] = math.floor if facts["dataloader_drop_last"] else math.ceil
    of_a_rank = rounded(rounded(batches) / facts["world_size"])
    return max(math.ceil(of_a_rank / int(facts["gradient_accumulation_steps"])), 1)


def step_samples(facts: Mapping[str, Any]) -> int:
    """Samples an optimiser step."""
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    return int(math.prod(facts[name] for name in sizes))


def same_sample(step: int, then: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """The step of the changed run that has seen as many samples as `step` of the former one, to the nearest step."""
    if then["train_images"] is None:  # a streamed run of an earlier version, whose length was unknown
        return round(step * step_samples(then) / step_samples(now))
    epochs, within = divmod(step, updates_an_epoch(then))
    images, images_now = int(then["train_images"]), int(now["train_images"])
    seen = epochs * images + min(within * step_samples(then), images)
    epochs, rest = divmod(seen, images_now)
    return epochs * updates_an_epoch(now) + round(rest / step_samples(now))
