"""Parameter groups as the original Mask2Former's: a slower backbone, and no weight decay where it does harm."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

ENCODER_BACKBONE = "pixel_level_module.encoder.backbone."
UNDECAYED_NAMES = ("level_embed", "position_embeddings", "cls_token", "register_tokens", "mask_token", "lambda1")


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


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, backbone_multiplier: float
) -> list[dict[str, Any]]:
    """Trainable parameters in at most four groups: backbone or not, decayed or not; each with its learning rate.

    LoRA factors learn at the full rate: they are new layers.
    """
    plain = undecayed(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainable(model).items():
        slow = ENCODER_BACKBONE in name and ".lora_" not in name
        rate = learning_rate * (backbone_multiplier if slow else 1.0)
        decay = 0.0 if name in plain else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters that train, by name."""
    return dict(_trainable(model))


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
