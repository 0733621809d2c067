"""Values for the recipe fields set to "auto": queries, learning rate, images per device, accumulation, epochs."""

import logging
import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from m2f_trainer.config.arguments import PixelRange, pixel_range_text
from m2f_trainer.config.fields import options_of
from m2f_trainer.config.recipe import AUTO, ModelArguments, Recipe, read_recipe, rows
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.collate import InstanceDataset, collate
from m2f_trainer.distributed import warn_on_main
from m2f_trainer.errors import MEMORY_ADVICE, TrainingError
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.model.sources import LIMITS
from m2f_trainer.run_folder import RECIPE
from m2f_trainer.training.optimizer import trainable

logger = logging.getLogger(__name__)
REFERENCE_RATE, REFERENCE_IMAGES = 1e-4, 16  # of the original Mask2Former and all of its published configurations
CPU_IMAGES, FIRST_TRY, HEADROOM = 2, 4, 0.9
FEWEST_QUERIES = 20
EPOCHS = ((500, 150), (2_000, 75), (10_000, 40), (math.inf, 25))
"""(upper limit of the number of training images, epochs): the middle of the ranges in RF-DETR's fine-tuning guide."""


def resolve(
    recipe: Recipe, samples: InstanceDataset, checkpoint: Path | None, probe: Callable[[ModelArguments, int], int]
) -> Recipe:
    """The recipe with numbers for "auto"; a resumed run keeps the numbers of its checkpoint.

    Args:
        samples: the training samples of an epoch, images or tiles
        probe: finds how many of them fit on a device with a model, up to a limit
    """
    model, train = copy(recipe.model), copy(recipe.train)
    automatic = ((owner, name) for owner in (model, train) for name, row in options_of(type(owner)).items() if row.auto)
    owners = {name: owner for owner, name in automatic if vars(owner)[name] == AUTO}
    if not owners:
        return recipe
    reasons: list[str] = []
    if checkpoint is not None and (checkpoint / RECIPE).is_file():
        before = read_recipe(checkpoint / RECIPE)
        for name, owner in owners.items():
            vars(owner)[name] = before.get(name, rows()[name].default)
    else:
        accumulates = "gradient_accumulation_steps" in owners
        spread = train.world_size * (1 if accumulates else train.gradient_accumulation_steps)
        if "num_queries" in owners:
            model.num_queries, reason = queries_for(samples.objects())
            reasons.append(reason)
        if "num_train_epochs" in owners:
            train.num_train_epochs = epochs_for(len(samples))
        if "per_device_train_batch_size" in owners:
            limit = min(max(REFERENCE_IMAGES // spread, 1), len(samples))
            train.per_device_train_batch_size = probe(model, limit)
        if accumulates:
            batch = train.per_device_train_batch_size * train.world_size
            train.gradient_accumulation_steps = accumulation_for(batch, len(samples))
            spread = train.world_size * train.gradient_accumulation_steps
        if "learning_rate" in owners:
            train.learning_rate = rate_for(min(train.per_device_train_batch_size * spread, len(samples)))
    values = ", ".join(f"{name} = {vars(owner)[name]:g}" for name, owner in owners.items())
    warn_on_main(logger, "auto: %s", "; ".join([values, *reasons]))
    return Recipe(model, recipe.data, train)


def with_checkpoint_range(recipe: Recipe, checkpoint: Path | None) -> Recipe:
    """The recipe with the pixel_range of its checkpoint where its own is "auto"."""
    if checkpoint is None or recipe.data.pixel_range != AUTO or not (checkpoint / RECIPE).is_file():
        return recipe
    before = read_recipe(checkpoint / RECIPE).get("pixel_range", AUTO)
    return replace(recipe, data=replace(recipe.data, pixel_range=before))


def with_pixel_range(recipe: Recipe, found: PixelRange) -> Recipe:
    """The recipe with the range of the dataset's values; it stays "auto" where no image has more than 8 bits."""
    return recipe if found is None else replace(recipe, data=replace(recipe.data, pixel_range=pixel_range_text(found)))


def queries_for(objects: NDArray[np.int64]) -> tuple[int, str]:
    """Number of queries that 99 % of the training samples need, rounded up to tens and within the limit; the reason.

    `objects`: number of objects of each training sample, (n,).
    """
    enough, most, limit = int(np.quantile(objects, 0.99, method="higher")), int(objects.max()), LIMITS["num_queries"]
    queries = max(FEWEST_QUERIES, 10 * math.ceil(enough / 10))
    reason = f"99 % of the training samples have at most {enough} objects, one has {most}"
    if queries > limit:
        reason += f"; more than {limit:,} queries are not possible: use tiles (tile_size)"
    return min(queries, limit), reason


def rate_for(images: int) -> float:
    """1e-4 for 16 images per optimizer step, scaled with the square root of their number.

    The square-root rule for Adam: Malladi et al. 2022, https://arxiv.org/abs/2205.10287.
    """
    return REFERENCE_RATE * math.sqrt(images / REFERENCE_IMAGES)


def accumulation_for(images: int, samples: int) -> int:
    """How many batches make 16 images per optimizer step, or as many as fit into it, at most those of an epoch.

    `images` are those of one batch on all devices, `samples` those of an epoch.
    """
    return max(min(REFERENCE_IMAGES // images, math.ceil(samples / images)), 1)


def epochs_for(images: int) -> float:
    """Epochs for a number of training images, from the table `EPOCHS`."""
    return float(next(epochs for below, epochs in EPOCHS if images < below))


def images_per_device(build: Callable[[], M2FModel], rows: InstanceDataset, train: TrainArguments, limit: int) -> int:
    """How many images fit on a device in a training step: a power of two up to `limit`, the same on all ranks.

    Measured with a separate, unsharded model and the images with the most objects. On a CPU it is 2 without a trial: a
    CPU swaps instead of failing, and larger batches gain nothing. Raises TrainingError if not even one image fits.
    """
    if train.device.type == "cpu":
        return min(CPU_IMAGES, limit)
    model = build().train()
    model.to(train.device)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    samples = samples_with_most_objects(rows, limit)
    found = largest_power_of_two(lambda images: fits(model, samples[:images], train), limit)
    if dist.is_initialized():
        least = torch.tensor(found, device=train.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        found = int(least)
    if found == 0:
        raise TrainingError(f"not even one image of this size fits the device's memory. {MEMORY_ADVICE}")
    return found


def largest_power_of_two(fits: Callable[[int], bool], limit: int) -> int:
    """The largest power of two up to `limit` that fits, found by doubling or halving from 4; 0 if 1 does not fit."""
    images = min(FIRST_TRY, 1 << int(math.log2(limit)))
    if not fits(images):
        while images > 1:
            images //= 2
            if fits(images):
                return images
        return 0
    while images * 2 <= limit and fits(images * 2):
        images *= 2
    return images


def samples_with_most_objects(rows: InstanceDataset, count: int) -> list[dict[str, Any]]:
    """The `count` samples with the most objects."""
    order = np.argsort(-rows.objects(), kind="stable")
    return [rows[index] for index in order[:count].tolist()]


def fits(model: M2FModel, samples: Sequence[dict[str, Any]], train: TrainArguments) -> bool:
    """Whether forward, backward and update of a batch leave a tenth of the device memory free."""
    device = train.device
    try:
        trial_step(model, collate(samples), train)
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            most, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return device.type != "cuda" or most <= HEADROOM * total


def trial_step(model: M2FModel, batch: dict[str, Any], train: TrainArguments) -> None:
    """One training step as the Trainer does it, at learning rate 0: the weights do not change."""
    device = train.device
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.0, weight_decay=0.0)
    moved = {name: batch[name].to(device) for name in ("pixel_values", "pixel_mask")}
    masks = {name: tensor.to(device) for name, tensor in batch["mask_labels"].items()}
    classes = [labels.to(device) for labels in batch["class_labels"]]
    kind = torch.bfloat16 if train.bf16 else torch.float16
    with torch.autocast(device.type, kind, enabled=bool(train.bf16 or train.fp16)):
        loss = model(**moved, mask_labels=masks, class_labels=classes).loss
    loss.backward()
    optimizer.step()
