"""Parameter groups as the original Mask2Former's: a slower backbone, and no weight decay where it does harm."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.training.ema import start

BACKBONE = "pixel_level_module.encoder.backbone."
HEAD, LORA = "neck and head", "backbone LoRA"
UNDECAYED_NAMES = (
    "level_embed", "position_embeddings", "cls_token", "register_tokens", "mask_token", "lambda1", "gamma",
)  # fmt: skip
BLOCK = re.compile(r"(?:^|\.)layer\.(\d+)\.")
STAGE = re.compile(r"(?:^|\.)stages\.(\d+)\.")


@dataclass(frozen=True)
class Rates:
    """What a group's learning rate and weight decay follow from.

    layer_decay  None, or what each block of the backbone has of the rate of the block above it
    """

    learning_rate: float
    weight_decay: float
    backbone_multiplier: float = 1.0
    layer_decay: float | None = None


def rates_of(arguments: Any) -> Rates:
    """The rates of a recipe; plain `TrainingArguments` know of no backbone."""
    if not isinstance(arguments, TrainArguments):
        return Rates(arguments.learning_rate, arguments.weight_decay)
    multiplier = arguments.backbone_lr_multiplier or 0.0
    return Rates(arguments.learning_rate, arguments.weight_decay, multiplier, arguments.layer_decay)


class Grouped:
    """transformers' optimiser of these arguments over the original's parameter groups: a factory, as Trainer takes."""

    def __call__(self, model: nn.Module, args: Any) -> Optimizer:
        """Build it."""
        factory, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
        optimizer: Optimizer = factory(parameter_groups(model, rates_of(args)), **settings)
        if isinstance(args, TrainArguments) and args.ema_decay is not None:
            optimizer.register_step_post_hook(start)
        return optimizer


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: norms, biases, embeddings (queries, levels, positions), LayerScale.

    The original (train_net.py `build_optimizer`) leaves norms and embeddings undecayed; biases follow ViT practice.
    """
    names = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = parameter.ndim <= 1 or isinstance(module, nn.Embedding) or name in UNDECAYED_NAMES
            if plain:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one name, learning rate and weight decay; neck and head come first.

    LoRA factors learn at the full rate: they are new layers. Raises RecipeError where `layer_decay` has no layers.
    """
    plain, trained = undecayed(model), trainable(model)
    top = top_block(model) if rates.layer_decay is not None else 0
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in sorted(trained.items(), key=lambda item: BACKBONE in item[0]):
        part, multiplier = HEAD, 1.0
        if BACKBONE in name and ".lora_" in name:
            part = LORA
        elif BACKBONE in name:
            part, multiplier = "backbone", rates.backbone_multiplier
            if rates.layer_decay is not None:
                block = block_of(name, top)
                part, multiplier = f"backbone, block {block}", multiplier * rates.layer_decay ** (top - block)
        decay = 0.0 if name in plain else rates.weight_decay
        start = {"name": part, "params": [], "lr": rates.learning_rate * multiplier, "weight_decay": decay}
        groups.setdefault((part, name in plain), start)["params"].append(parameter)
    return list(groups.values())


def top_block(model: nn.Module) -> int:
    """Number of the backbone's last block: its transformer layers counted from 1, or its stages from 0.

    A ConvNeXt counts by stages, since its third has up to 27 blocks, and a decay for each would stop the stem.
    """
    names = [name for name, _ in model.named_parameters() if BACKBONE in name]
    found = [block_of(name, -1) for name in names]
    if max(found, default=-1) < 0 or not any(BLOCK.search(name) or STAGE.search(name) for name in names):
        raise RecipeError("layer_decay needs a backbone of layers or stages, and this one has none: leave it out")
    return max(found)


def block_of(name: str, top: int) -> int:
    """The block that a backbone's parameter counts to: 0 for the embeddings, `top` for what comes after the blocks."""
    block, stage = BLOCK.search(name), STAGE.search(name)
    if stage is not None:
        return int(stage[1])
    if block is not None:
        return int(block[1]) + 1
    return 0 if ".embeddings." in name else top


def trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


Factor = Callable[[int], float]
STEP_DOWN = 0.1  # what a milestone leaves of the learning rate, as in the original's schedule


@dataclass(frozen=True)
class Shape:
    """Factors by step, to be multiplied with those of transformers' schedule.

    The backbone stands still for `head_first` steps and then warms up for `warmup` steps, as in the two stages of EoMT
    (Kerssies et al. 2025, https://arxiv.org/abs/2503.19108); each milestone takes the rate to a tenth.
    """

    head_first: int
    warmup: int
    milestones: tuple[int, ...]

    def head(self, step: int) -> float:
        """Of neck and head."""
        return float(STEP_DOWN ** sum(step >= milestone for milestone in self.milestones))

    def backbone(self, step: int) -> float:
        """Of the backbone, LoRA included."""
        ramp = (step - self.head_first) / self.warmup if self.warmup else float(step >= self.head_first)
        return self.head(step) * (min(max(ramp, 0.0), 1.0) if self.head_first else 1.0)


def shape_of(arguments: TrainArguments, total: int) -> Shape:
    """The shape that a recipe asks for, in a run of so many steps; fields below 1 are shares of it."""
    first = arguments.head_first_steps
    steps = int(first if first >= 1 else first * total)
    milestones = tuple(round(share * total) for share in arguments.lr_milestones or ())
    return Shape(steps, arguments.get_warmup_steps(total), milestones)


class ShapedRates(TrainerCallback):
    """Puts the recipe's shape on the schedule that the Trainer has made."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Multiply each group's factor, and set the rates of the step that the run begins with."""
        schedule = kwargs["lr_scheduler"]
        if not isinstance(args, TrainArguments) or not isinstance(schedule, LambdaLR):
            return
        if args.head_first_steps or args.lr_milestones:
            put_on(schedule, kwargs["optimizer"].param_groups, shape_of(args, state.max_steps), state.global_step)


def put_on(schedule: LambdaLR, groups: list[dict[str, Any]], shape: Shape, step: int) -> None:
    """Multiply the shape into a schedule's factors, and set the groups' rates at a step."""
    shapes = [shape.backbone if group["name"].startswith("backbone") else shape.head for group in groups]
    schedule.lr_lambdas = [_product(one, other) for one, other in zip(schedule.lr_lambdas, shapes, strict=True)]
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)
    schedule._last_lr = [group["lr"] for group in groups]


def _product(one: Factor, other: Factor) -> Factor:
    return lambda step: one(step) * other(step)


def curve(arguments: TrainArguments, total: int) -> tuple[Factor, Factor]:
    """Factor of the learning rate by step in a run of so many: neck and head's, and the backbone's."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    plain = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        arguments.get_warmup_steps(total),
        total,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
    shape = shape_of(arguments, total)
    factor: Factor = plain.lr_lambdas[0] if isinstance(plain, LambdaLR) else lambda _: 1.0
    return _product(factor, shape.head), _product(factor, shape.backbone)
