"""Parameter groups as the original Mask2Former's: a slower backbone, and no weight decay where it does harm."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from m2f_trainer.errors import RecipeError
from m2f_trainer.train_arguments import TrainArguments
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
