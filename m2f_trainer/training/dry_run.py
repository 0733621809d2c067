"""The plan of a run, printed by `m2f train RECIPE --dry_run`: parameter groups, steps, learning rates, memory.

First the memory estimate (`Memory`, `estimate`), then the plan (`Plan`, `plan`), then its text (`plan_text`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from m2f_trainer.config.fields import options_of
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.masks.rle import Size
from m2f_trainer.model.backbones import ModelError, feature_maps, stride_of
from m2f_trainer.model.mask2former import M2FModel, backbone_of
from m2f_trainer.training.callbacks.clock import TICKS
from m2f_trainer.training.checkpointing.fingerprint import length_in_steps, updates_per_epoch
from m2f_trainer.training.feature_cache import features
from m2f_trainer.training.optimizer import parameter_groups, rate_factors, rates_of

ADAM_MOMENTS = 2
GIGA, MEGA = 1e9, 1e6
PATIENCE = 5.0
"""Maximum seconds for the measurement of a step."""
POINTS = (
    0.0,
    0.02,
    0.05,
    0.1,
    0.25,
    0.5,
    0.75,
    0.9,
    0.97,
    1.0,
)  # fractions of the run at which the learning rate is printed


@dataclass(frozen=True)
class Memory:
    """Bytes on a device during training. `activations` are per image, the other values per model."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    def total(self, images: int) -> int:
        """Bytes for a batch of `images`."""
        return self.weights + self.gradients + self.optimizer + images * self.activations


def estimate(model: M2FModel, instances: int, *, bf16: bool, averaged: bool) -> Memory:
    """Memory for training a model with AdamW, at its own image size and with `instances` objects per image."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.named_parameters()}
    trained = sum(sizes[name] for name, tensor in model.named_parameters() if tensor.requires_grad)
    slots = ADAM_MOMENTS + int(averaged)
    return Memory(sum(sizes.values()), trained, slots * trained, activations(model, instances, bf16))


def activations(model: M2FModel, instances: int, bf16: bool) -> int:
    """Bytes that autograd keeps for one image of the model's size.

    Measured at 1/8 and 1/4 of the sides, and extrapolated linearly in the image's area; at the full size where the
    backbone takes no other.
    """
    config, backbone = model.config, backbone_of(model.config)
    stride, (height, width) = stride_of(backbone), (config.image_height, config.image_width)
    small, middle = (
        (max(round(height / part / stride), least) * stride, max(round(width / part / stride), least) * stride)
        for part, least in ((8, 4), (4, 8))
    )
    if not takes_size(backbone, small):
        return image_bytes(model, (height, width), instances, bf16)
    first, second = (image_bytes(model, size, instances, bf16) for size in (small, middle))
    slope = (second - first) / (middle[0] * middle[1] - small[0] * small[1])
    return int(first + slope * (height * width - small[0] * small[1]))


def takes_size(backbone: PreTrainedConfig, size: Size) -> bool:
    """Whether a backbone takes images of `size` (height, width)."""
    try:
        feature_maps(backbone, size)
    except ModelError:
        return False
    return True


def image_bytes(model: M2FModel, size: Sequence[int], instances: int, bf16: bool) -> int:
    """Bytes that autograd keeps for one image of `size` (H, W), parameters excluded."""
    mode, device = model.training, model.device
    inputs = example_inputs(size, instances, device)
    model.train()
    with torch.random.fork_rng(devices=[]), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        total = kept_bytes(lambda: model(**inputs).loss, model)
    model.train(mode)
    return total


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps between a forward pass and its backward, parameters excluded."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    total = sum(found.values())
    del loss
    return total


def example_inputs(size: Sequence[int], instances: int, device: torch.device, images: int = 1) -> Mapping[str, object]:
    """Model inputs for grey images (B, 3, H, W) with objects of a quarter of its sides."""
    height, width = size
    masks = torch.zeros(instances, height, width, device=device)
    masks[:, : height // 4, : width // 4] = 1
    return {
        "pixel_values": torch.full((images, 3, height, width), 127, dtype=torch.uint8, device=device),
        "mask_labels": [masks] * images,
        "class_labels": [torch.zeros(instances, dtype=torch.long, device=device)] * images,
    }


def seconds_per_step(
    model: M2FModel, train: TrainArguments, instances: int, *, kept_features: bool
) -> tuple[float, float]:
    """Time of an optimizer step on this machine, measured with grey images, without data loading and the update; and
    time of the features of an image, where they are kept (`feature_cache`) and not computed in the step, otherwise 0.

    One image is measured first. If a batch would take longer than `PATIENCE`, the time of one image is multiplied by
    the number of images.
    """
    device, size = train.device, (model.config.image_height, model.config.image_width)
    mode, home = model.training, model.device
    cast(nn.Module, model).to(device).train()

    def measure(images: int) -> tuple[float, float]:
        inputs: dict[str, Any] = dict(example_inputs(size, instances, device, images))
        before = time.perf_counter()
        if kept_features:
            pixels = inputs["pixel_values"]
            inputs["backbone_maps"] = features(model, pixels, torch.ones_like(pixels[:, 0], dtype=torch.bool), train)
            synchronize()
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(train.bf16)):
            loss = model(**inputs).loss
        loss.backward()
        synchronize()
        model.zero_grad()
        return time.perf_counter() - begun, (begun - before) / images

    with torch.random.fork_rng():
        measure(1)
        batch, (one, of_features) = train.per_device_train_batch_size, measure(1)
        took, of_features = measure(batch) if batch * one < PATIENCE else (batch * one, of_features)
    cast(nn.Module, model).train(mode).to(home)
    return took * train.gradient_accumulation_steps, of_features if kept_features else 0.0


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Plan:
    """The plan of a run. `groups` are the optimizer's, with the number of values of each under "params".

    `cache_seconds` is the time in which the features of a `feature_cache` are computed, before the first step.
    """

    groups: list[dict[str, Any]]
    parameters: int
    trained: int
    memory: Memory
    instances: int
    images: int
    steps_per_epoch: int
    steps: int
    step_seconds: float
    cache_seconds: float
    train: TrainArguments


def plan(model: M2FModel, train: TrainArguments, images: int, instances: int, views: int = 0) -> Plan:
    """The plan of a run with `images` training images of `instances` objects each; `views`: its `feature_cache`."""
    groups = [
        {**group, "params": sum(parameter.numel() for parameter in group["params"])}
        for group in parameter_groups(model, rates_of(train))
    ]
    per_epoch = updates_per_epoch({**vars(train), "world_size": train.world_size, "train_images": images})
    steps = length_in_steps(train, per_epoch) if train.max_minutes is None else TICKS
    memory = estimate(model, instances, bf16=bool(train.bf16), averaged=train.ema_decay is not None)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(group["params"] for group in groups)
    seconds, of_features = seconds_per_step(model, train, instances, kept_features=views > 0)
    cache = of_features * views * images / train.world_size
    return Plan(groups, total, trained, memory, instances, images, per_epoch, max(steps, 1), seconds, cache, train)


def plan_text(plan: Plan) -> str:
    """The plan as a page of text."""
    share = 100 * plan.trained / plan.parameters
    counts = f"{plan.parameters / MEGA:.1f} M parameters, {plan.trained / MEGA:.1f} M of them trained ({share:.1f} %)"
    groups = [
        (group["name"], f"{group['params']:,}", f"{group['lr']:.2e}", f"{group['weight_decay']:g}")
        for group in plan.groups
    ]
    table = aligned_columns([("group", "parameters", "learning rate", "weight decay"), *groups])
    parts = [counts, table, steps_text(plan), curve_text(plan), memory_text(plan), resolved_text(plan.train)]
    return "\n\n".join([*parts, "This was a dry run: nothing was trained, and nothing written."])


def steps_text(plan: Plan) -> str:
    """The lines on the length of the run and its batch size."""
    train = plan.train
    device, accumulated, devices = (
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        train.world_size,
    )
    length = (
        f"{plan.steps:,} optimizer steps, {plan.steps_per_epoch:,} per epoch: "
        f"{plan.steps / plan.steps_per_epoch:.1f} epochs of {plan.images:,} images"
    )
    if train.max_minutes is not None:
        per_epoch = f"{plan.steps_per_epoch:,} optimizer steps per epoch of {plan.images:,} images"
        length = f"{train.max_minutes:g} minutes; {per_epoch}"
    return (
        f"{length}\n"
        f"{device * accumulated * devices} images per step: "
        f"{device} per device x {accumulated} accumulated x {devices} devices\n"
        f"{time_text(plan)}"
    )


def time_text(plan: Plan) -> str:
    """The line on the time of the run."""
    each, cache = f"about {plan.step_seconds:.2g} s a step on this machine", plan.cache_seconds
    if cache:
        each = f"about {tqdm.format_interval(cache)} for the features of feature_cache, then {each}"
    if plan.train.max_minutes is None:
        whole = tqdm.format_interval(cache + plan.steps * plan.step_seconds)
        return f"{each}, {whole} in all, without data and evaluations"
    steps = max(60 * plan.train.max_minutes - cache, 0) / plan.step_seconds
    return f"{each}, so about {steps:,.0f} steps or {steps / plan.steps_per_epoch:.1f} epochs"


def curve_text(plan: Plan) -> str:
    """The table of learning rates at a few steps; with layer decay the backbone's is that of its last block."""
    head, backbone = rate_factors(plan.train, plan.steps)
    rate, multiplier = plan.train.learning_rate, plan.train.backbone_lr_multiplier or 0.0
    rows, minutes = [], plan.train.max_minutes
    for step in sorted({min(round(point * plan.steps), plan.steps - 1) for point in POINTS}):
        at = f"{step:,}" if minutes is None else f"{minutes * step / plan.steps:.1f}"
        rows.append((at, f"{rate * head(step):.2e}", f"{rate * multiplier * backbone(step):.2e}"))
    trains = any(group["name"] not in ("neck and head", "backbone LoRA") for group in plan.groups)
    heads = ("at step" if minutes is None else "at minute", "learning rate", "of the backbone")
    return aligned_columns([row if trains else row[:2] for row in [heads, *rows]])


def memory_text(plan: Plan) -> str:
    """The lines on memory: the estimate, its parts, and how it was made."""
    memory, images = plan.memory, plan.train.per_device_train_batch_size
    parts = [
        ("weights", memory.weights), ("gradients", memory.gradients), ("optimizer", memory.optimizer),
        (f"activations, {images} x {memory.activations / GIGA:.2f}", images * memory.activations),
    ]  # fmt: skip
    rows = [(name, f"{size / GIGA:.2f} GB") for name, size in parts]
    shared = "weights, gradients and optimizer" if plan.train.fsdp else "gradients and optimizer (ZeRO 2)"
    sharded = f"\nUnsharded: each of N devices will hold about 1/N of {shared}."
    return (
        f"about {memory.total(images) / GIGA:.1f} GB of memory per device\n{aligned_columns(rows)}\n"
        f"Activations: what autograd keeps of two small images with {plan.instances} objects each, extrapolated\n"
        "to the full size. The rest is counted. A device's context and workspaces come on top: allow a fifth more."
        + ("\nWith gradient_checkpointing the activations take less." if plan.train.gradient_checkpointing else "")
        + (sharded if plan.train.fsdp or plan.train.deepspeed else "")
    )


def resolved_text(train: TrainArguments) -> str:
    """The training fields that affect results, with defaults and "auto" resolved."""
    values = {name: vars(train)[name] for name, row in options_of(type(train)).items() if row.changes_results}
    return aligned_columns([(name, str(getattr(value, "value", value))) for name, value in values.items()])


def aligned_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns: the first flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
