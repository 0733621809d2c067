"""Sharded training: weights over processes (FSDP2), or gradients and moments (DeepSpeed ZeRO)."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.model.lora import lora_layers


def require_engine(arguments: TrainingArguments, model: nn.Module) -> None:
    """Raise RecipeError where FSDP or DeepSpeed would not do what the recipe says."""
    if (arguments.fsdp or arguments.deepspeed) and lora_layers(model):
        raise RecipeError(
            "tune lora trains too little to be worth sharding, and its checkpoints would not load again: leave fsdp "
            "and deepspeed out, torchrun alone spreads the images"
        )
    if arguments.fsdp:
        _require_whole_checkpoints(arguments)
        require_accelerators(arguments)
    if arguments.deepspeed:
        _require_plain_zero(arguments)


def require_accelerators(arguments: TrainingArguments) -> None:
    """Raise RecipeError where a recipe asks for FSDP and accelerate would silently run without it."""
    if arguments.world_size < 2 or arguments.device.type == "cpu":
        raise RecipeError(
            "fsdp shards over several accelerators under torchrun, and here there is one process, or only CPUs: leave "
            "fsdp out, or start with bash recipes/torchrun_single_node.sh GPUS RECIPE.json"
        )


def _require_whole_checkpoints(arguments: TrainingArguments) -> None:
    settings = arguments.fsdp_plugin_args or {}
    wanted = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    changed = [f"{name}: {settings[name]}" for name, value in wanted.items() if settings.get(name, value) != value]
    if changed:
        raise RecipeError(
            f"fsdp_config: {', '.join(changed)} would leave checkpoints without a model that loads anywhere. Leave out "
            "version and state_dict_type: FSDP2 and full state dicts are the defaults"
        )


def _require_plain_zero(arguments: TrainingArguments) -> None:
    """Raise RecipeError for settings that ZeRO would silently drop. ZeRO 1 and 2 train as one process does."""
    config: dict[str, Any] = vars(arguments)["hf_deepspeed_config"].config
    stage = config.get("zero_optimization", {}).get("stage", 0)
    own = [name for name in ("optimizer", "scheduler") if name in config]
    if stage == 3:
        raise RecipeError(
            "deepspeed: ZeRO 3 gathers a layer's weights when the layer is called, and the decoders read weights of "
            "layers that are not called; --fsdp true shards weights too"
        )
    if own:
        raise RecipeError(
            f"deepspeed: leave {' and '.join(own)} out of its file, or the recipe's groups, rates and schedule are lost"
        )
    if arguments.bf16 or arguments.fp16:
        raise RecipeError(
            'deepspeed: bf16 and fp16 would take the weights\' float32 from them; "torch_autocast" in its file does not'
        )
    if arguments.lr_scheduler_type == "polynomial":
        raise RecipeError(
            "deepspeed: transformers' polynomial schedule cannot read ZeRO's optimiser. --lr_scheduler_type linear is "
            "nearly the same: power 1, where the recipe's is 0.9"
        )
    if isinstance(arguments, TrainArguments) and arguments.ema_decay is not None:
        raise RecipeError(
            "deepspeed: leave ema_decay out: ZeRO does not give access to the weights to average; FSDP does"
        )


def keep_float32(arguments: TrainingArguments) -> None:
    """Make FSDP keep the types of weights and activations; see `autocast_sharded`."""
    if arguments.fsdp:
        plain = {"mixed_precision_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}
        arguments.fsdp_plugin_args = {**(arguments.fsdp_plugin_args or {}), **plain}


def autocast_sharded(model: nn.Module, arguments: TrainingArguments) -> None:
    """Run a model to be sharded with FSDP2 under autocast, as accelerate runs all other models.

    accelerate would instead have FSDP2 cast all weights to bfloat16, but pixel decoder and losses compute in float32.
    FSDP2 warns about outputs that are views because gradients are lost where they are written to; no code here does so.
    """
    if not arguments.fsdp:
        return
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if arguments.bf16 or arguments.fp16:
        kind = torch.bfloat16 if arguments.bf16 else torch.float16
        model.forward = torch.autocast(arguments.device.type, kind)(model.forward)
