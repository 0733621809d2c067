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
    """Raise RecipeError if FSDP or DeepSpeed would ignore or break a setting of the recipe."""
    if (arguments.fsdp or arguments.deepspeed) and lora_layers(model):
        raise RecipeError(
            "tune lora has too few trained weights to be worth sharding, and its checkpoints would not load again: "
            "leave fsdp and deepspeed out; torchrun alone distributes the images"
        )
    if arguments.fsdp:
        _require_whole_checkpoints(arguments)
        require_accelerators(arguments)
    if arguments.deepspeed:
        _require_plain_zero(arguments)


def require_accelerators(arguments: TrainingArguments) -> None:
    """Raise RecipeError if accelerate would silently run without FSDP."""
    if arguments.world_size < 2 or arguments.device.type == "cpu":
        raise RecipeError(
            "fsdp needs several accelerators under torchrun; this run has one process, or only CPUs: leave fsdp out, "
            "or start it with bash recipes/torchrun_single_node.sh GPUS RECIPE.json"
        )


def _require_whole_checkpoints(arguments: TrainingArguments) -> None:
    settings = arguments.fsdp_plugin_args or {}
    wanted = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    changed = [f"{name}: {settings[name]}" for name, value in wanted.items() if settings.get(name, value) != value]
    if changed:
        raise RecipeError(
            f"fsdp_config: with {', '.join(changed)} checkpoints would have no model that loads without FSDP. Leave "
            "out version and state_dict_type: FSDP2 and full state dicts are the defaults"
        )


def _require_plain_zero(arguments: TrainingArguments) -> None:
    """Raise RecipeError for settings that ZeRO would silently drop. ZeRO 1 and 2 train as one process does."""
    config: dict[str, Any] = vars(arguments)["hf_deepspeed_config"].config
    stage = config.get("zero_optimization", {}).get("stage", 0)
    own = [name for name in ("optimizer", "scheduler") if name in config]
    if stage == 3:
        raise RecipeError(
            "deepspeed: ZeRO 3 is not supported, since it gathers a layer's weights when the layer is called, and the "
            "decoders use weights of layers that are not called. Use --fsdp true, which shards weights too"
        )
    if own:
        raise RecipeError(
            f"deepspeed: remove {' and '.join(own)} from its file; it would replace the recipe's groups and schedule"
        )
    if arguments.bf16 or arguments.fp16:
        raise RecipeError(
            "deepspeed: bf16 and fp16 would convert the weights from float32 to half precision. Leave them out, and "
            'set "torch_autocast" in its file'
        )
    if arguments.lr_scheduler_type == "polynomial":
        raise RecipeError(
            "deepspeed: transformers' polynomial schedule does not work with ZeRO's optimizer. Use --lr_scheduler_type "
            "linear, which is nearly the same: power 1 instead of 0.9"
        )
    if isinstance(arguments, TrainArguments) and arguments.ema_decay is not None:
        raise RecipeError(
            "deepspeed: leave ema_decay out, since ZeRO gives no access to the weights to average; or use --fsdp true"
        )


def keep_float32(arguments: TrainingArguments) -> None:
    """Make FSDP keep the types of weights and activations; see `autocast_sharded`."""
    if arguments.fsdp:
        plain = {"mixed_precision_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}
        arguments.fsdp_plugin_args = {**(arguments.fsdp_plugin_args or {}), **plain}


def autocast_sharded(model: nn.Module, arguments: TrainingArguments) -> None:
    """Run a model to be sharded with FSDP2 under autocast, as accelerate runs all other models.

    accelerate would instead have FSDP2 cast all weights to bfloat16, but pixel decoder and losses compute in float32.
    FSDP2 warns about outputs that are views, since writing to them would lose gradients; no code here writes to them.
    """
    if not arguments.fsdp:
        return
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if arguments.bf16 or arguments.fp16:
        kind = torch.bfloat16 if arguments.bf16 else torch.float16
        model.forward = torch.autocast(arguments.device.type, kind)(model.forward)
