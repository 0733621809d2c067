"""The optimizer and the learning rate schedule.

Parameter groups follow the original Mask2Former: a slower backbone, no weight decay on norms, biases and embeddings.
The schedule is one of transformers', multiplied with the recipe's own factors by group and step.
"""

import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from m2f_trainer.config.training_arguments import MUON, TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.training.ema import add_averages
from m2f_trainer.training.muon import MuonAdamW

BACKBONE = "pixel_level_module.encoder.backbone."
HEAD, LORA = "neck and head", "backbone LoRA"
UNDECAYED_NAMES = (
    "level_embed", "position_embeddings", "cls_token", "register_tokens", "mask_token", "lambda1", "gamma",
    "relative_position_bias_table", "rel_pos_h", "rel_pos_w",
)  # fmt: skip
NOT_MATRICES = ("sampling_offsets", "attention_weights", "class_predictor", "stem.stages.0")
LARGEST = 256
"""Muon leaves two kinds of matrices to AdamW. `NOT_MATRICES` are layers initialised with zero, and the first and last
layer, as its author advises. Matrices whose smaller side is above `LARGEST` take too long to orthogonalise."""
WEIGHTED = (nn.Linear, nn.Conv2d)
"""Layers whose weights stay matrices, even with one output."""
POSITION_BIAS = "continuous_position_bias_mlp"
"""Swin V2's network that makes its relative position biases."""
BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
STAGE = re.compile(r"(?:^|\.)(?:stages|encoder\.layers)\.(\d+)\.")


@dataclass(frozen=True)
class Rates:
    """The values from which each group's learning rate and weight decay are computed.

    layer_decay  None, or the ratio of each backbone block's learning rate to that of the block above it
    """

    learning_rate: float
    weight_decay: float
    backbone_multiplier: float = 1.0
    layer_decay: float | None = None


def rates_of(arguments: TrainingArguments) -> Rates:
    """The rates of a recipe; plain `TrainingArguments` have one learning rate for all parameters."""
    if not isinstance(arguments, TrainArguments):
        return Rates(arguments.learning_rate, arguments.weight_decay)
    multiplier = arguments.backbone_lr_multiplier or 0.0
    return Rates(arguments.learning_rate, arguments.weight_decay, multiplier, arguments.layer_decay)


def build_optimizer(model: nn.Module, arguments: TrainingArguments) -> Optimizer:
    """The optimizer that `optim` names, Muon or one of transformers, over our parameter groups."""
    groups, stock = parameter_groups(model, rates_of(arguments)), copy(arguments)
    if arguments.optim == MUON:  # the fused AdamW skips steps with fp16 overflows by itself, Muon does not
        stock.optim = OptimizerNames.ADAMW_TORCH if arguments.fp16 else OptimizerNames.ADAMW_TORCH_FUSED
    factory, settings = Trainer.get_optimizer_cls_and_kwargs(stock, model)  # type: ignore[arg-type]
    if arguments.optim == MUON:
        precision = torch.bfloat16 if arguments.bf16 else torch.float32
        factory, settings = MuonAdamW, {**settings, "matrices": matrices(model), "precision": precision}
    optimizer: Optimizer = factory(groups, **settings)
    if isinstance(arguments, TrainArguments) and arguments.ema_decay is not None:
        optimizer.register_step_post_hook(add_averages)
    return optimizer


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: norms, biases, embeddings (queries, levels, positions), LayerScale.

    The original (train_net.py `build_optimizer`) leaves norms and embeddings undecayed; biases follow ViT practice.
    Norms and scales may be stored as (1, 1, 1, C) or (C, 1, 1).
    """
    names = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            vector = parameter.numel() == max(parameter.shape, default=1) and not isinstance(module, WEIGHTED)
            known = isinstance(module, nn.Embedding) or name in UNDECAYED_NAMES or POSITION_BIAS in prefix
            if parameter.ndim <= 1 or vector or known:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal name, learning rate and weight decay; neck and head come first.

    LoRA factors train at the full rate because they are new layers. Raises RecipeError if `layer_decay` is set and the
    backbone has no layers.
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


def matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """Parameters of neck and head that Muon updates -> number of matrices in each (3 in a packed attention weight)."""
    plain, found = undecayed(model), {}
    for name, parameter in trainable(model).items():
        if BACKBONE in name or name in plain or any(word in name for word in NOT_MATRICES):
            continue
        if parameter.ndim > 1 and 1 < min(len(parameter), parameter[0].numel()) <= LARGEST:
            found[parameter] = 3 if name.endswith("in_proj_weight") else 1
    return found


def top_block(model: nn.Module) -> int:
    """Number of the backbone's last block: its transformer layers counted from 1, or its stages from 0.

    A ConvNeXt is counted by stages: its third stage has up to 27 blocks, and a decay per block would freeze the stem.
    """
    names = [name for name, _ in model.named_parameters() if BACKBONE in name]
    found = [block_of(name, -1) for name in names]
    if max(found, default=-1) < 0 or not any(BLOCK.search(name) or STAGE.search(name) for name in names):
        raise RecipeError("layer_decay needs a backbone of layers or stages, and this one has none: leave it out")
    return max(found)


def block_of(name: str, top: int) -> int:
    """The block that a backbone parameter belongs to: 0 for the embeddings, `top` for layers after the last block."""
    block, stage = BLOCK.search(name), STAGE.search(name)
    if stage is not None:
        return int(stage[1])
    if block is not None:
        return int(block[1]) + 1
    return 0 if ".embeddings." in name or ".embedder." in name else top


def trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


Factor = Callable[[int], float]
STEP_DOWN = 0.1  # factor of the learning rate at each milestone, as in the original's schedule


@dataclass(frozen=True)
class RateShape:
    """The recipe's own factors of the learning rate by step; they multiply those of transformers' schedule.

    The backbone is frozen for `head_first` steps and then warms up for `warmup` steps, as in the two stages of EoMT
    (Kerssies et al. 2025, https://arxiv.org/abs/2503.19108). Each milestone lowers the rate to a tenth.
    """

    head_first: int
    warmup: int
    milestones: tuple[int, ...]

    def head(self, step: int) -> float:
        """Factor of neck and head."""
        return float(STEP_DOWN ** sum(step >= milestone for milestone in self.milestones))

    def backbone(self, step: int) -> float:
        """Factor of the backbone, LoRA included."""
        ramp = (step - self.head_first) / self.warmup if self.warmup else float(step >= self.head_first)
        return self.head(step) * (min(max(ramp, 0.0), 1.0) if self.head_first else 1.0)


def rate_shape(arguments: TrainArguments, total: int) -> RateShape:
    """The shape for a run of `total` optimizer steps; recipe fields below 1 are shares of it."""
    first = arguments.head_first_steps
    steps = int(first if first >= 1 else first * total)
    milestones = tuple(round(share * total) for share in arguments.lr_milestones or ())
    return RateShape(steps, arguments.get_warmup_steps(total), milestones)


def with_rate_shape(schedule: LRScheduler, arguments: TrainingArguments, total: int) -> LRScheduler:
    """A schedule of transformers multiplied with the recipe's shape, for a run of `total` optimizer steps.

    It is returned unchanged if the recipe has no shape, or if it is not defined by factors (ReduceLROnPlateau).
    """
    if not isinstance(arguments, TrainArguments) or not isinstance(schedule, LambdaLR):
        return schedule
    if not arguments.head_first_steps and not arguments.lr_milestones:
        return schedule
    shape, groups = rate_shape(arguments, total), schedule.optimizer.param_groups
    shapes = [shape.backbone if group["name"].startswith("backbone") else shape.head for group in groups]
    return LambdaLR(schedule.optimizer, [_product(*pair) for pair in zip(schedule.lr_lambdas, shapes, strict=True)])


def _product(one: Factor, other: Factor) -> Factor:
    return lambda step: one(step) * other(step)


def rate_factors(arguments: TrainArguments, total: int) -> tuple[Factor, Factor]:
    """Factors of the learning rate by step in a run of `total` steps: of neck and head, and of the backbone."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    plain = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        arguments.get_warmup_steps(total),
        total,
        scheduler_specific_kwargs=arguments.schedule_kwargs(total),
    )
    shape = rate_shape(arguments, total)
    factor: Factor = plain.lr_lambdas[0] if isinstance(plain, LambdaLR) else lambda _: 1.0
    return _product(factor, shape.head), _product(factor, shape.backbone)
