"""Tuning of the backbone: frozen, low-rank adapters (LoRA, through peft), or full.

A model with adapters still saves and loads as a plain model: its state dict holds the merged weights under their usual
names, with the factors beside them. Without peft the merged weights are read and the factors ignored; a resumed
run reads the factors and keeps the base weights that it started from.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbones import load_pretrained
from .build import load_backbone_weights
from .mask2former import M2FConfig, M2FModel, backbone_of
from .sources import ModelError, load_config, share_weights
from .weights import BACKBONE

logger = logging.getLogger(__name__)

ADAPTER = "default"
ATTENTION = frozenset({"attention", "attn"})
"""Names of the attention modules in transformers' backbones."""
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al. 2022, https://arxiv.org/abs/2106.09685): the update is alpha / rank x B A."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    mlp: bool = False  # the feed-forward layers too, not only attention


def set_tuning(model: M2FModel, tune: str, lora: LoraSettings | None = None) -> None:
    """Set the tuning of the backbone: "frozen", "lora" or "full". Neck and head are always trained.

    Raises ModelError for any other value, and for LoRA on a backbone without attention layers.
    """
    backbone = model.encoder.backbone
    if tune not in ("frozen", "lora", "full"):
        raise ModelError(f"tune must be 'frozen', 'lora' or 'full', got {tune!r}")
    if tune != "full":
        backbone.requires_grad_(False)
    if tune == "lora":
        attach_lora(model, lora or LoraSettings())


def attach_lora(model: M2FModel, settings: LoraSettings) -> None:
    """Add trainable low-rank factors to the backbone's attention (and feed-forward) layers."""
    _attach(model, settings, lora_targets(model.encoder.backbone, settings.mlp))


def _attach(model: M2FModel, settings: LoraSettings, targets: list[str]) -> None:
    """Add factors to the layers of the backbone with these names."""
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets, bias="none"
    )
    inject_adapter_in_model(config, model.encoder.backbone, adapter_name=ADAPTER)
    model.register_state_dict_post_hook(_merge_on_save)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_keep_base_on_load)  # type: ignore[no-untyped-call]


def lora_targets(backbone: nn.Module, mlp: bool) -> list[str]:
    """Names of the attention's linear layers, with `mlp` also the feed-forward ones. Raises ModelError if none."""
    linears = {name: name.split(".") for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    attention = {name for name, parts in linears.items() if ATTENTION.intersection(parts)}
    if not attention:
        raise ModelError(
            "tune 'lora' needs a backbone with attention layers (a ViT); use 'frozen' or 'full' with this one"
        )
    return [name for name, parts in linears.items() if name in attention or (mlp and "mlp" in parts)]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _merge_on_save(model: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Turn the state dict of a model with adapters into that of the merged model, plus the factors."""
    for name, layer in lora_layers(model).items():
        for key in ("weight", "bias"):
            base = state.pop(f"{prefix}{name}.base_layer.{key}", None)
            if base is not None:
                state[f"{prefix}{name}.{key}"] = base + layer.get_delta_weight(ADAPTER) if key == "weight" else base


def _keep_base_on_load(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Undo `_merge_on_save`: take the factors from `state` and the base weights from the model itself.

    Raises ModelError when the merged weights in `state` were made from another base.
    """
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        for key, current in base.named_parameters(recurse=False):
            merged = state.pop(f"{prefix}{name}.{key}", None)
            state[f"{prefix}{name}.base_layer.{key}"] = current.detach()
            if merged is not None and key == "weight":
                _check_base(f"{prefix}{name}", merged, current, layer.scaling[ADAPTER], state)


def _check_base(name: str, merged: Tensor, base: Tensor, scale: float, state: dict[str, Tensor]) -> None:
    down, up = (state.get(f"{name}.lora_{letter}.{ADAPTER}.weight") for letter in "AB")
    if down is None or up is None:
        raise ModelError(f"{name}: no LoRA factors beside the merged weights, so this is no checkpoint of a LoRA run")
    expected = base.detach().cpu().float() + scale * (up.float() @ down.float()).cpu()
    if not torch.allclose(merged.cpu().float(), expected, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"{name}: the checkpoint's merged weights don't come from this backbone's: it was trained on other "
            "pretrained weights. Start from the same backbone, or from this checkpoint with init_from"
        )


@torch.no_grad()
def merge(model: M2FModel) -> None:
    """Merge the adapters into the weights permanently; the model then needs no peft."""
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        weight = base.get_parameter("weight")
        merged = weight + layer.get_delta_weight(ADAPTER)  # a new tensor: other models may share the base
        base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
        model.set_submodule(name, base)
    model._state_dict_hooks.clear()
    model._load_state_dict_pre_hooks.clear()


def save_adapter(model: M2FModel, folder: Path) -> None:
    """Save everything except the backbone's own weights: LoRA factors, neck, head and both configurations.

    A few megabytes instead of hundreds; `load_adapter` is the inverse. Raises ModelError for a model that it could not
    load: without adapters, or on a backbone other than the published one.
    """
    layers = lora_layers(model)
    if not layers:
        raise ModelError("this model has no adapters: only a model trained with tune 'lora' can be saved as an adapter")
    _check_published(model)
    folder.mkdir(parents=True, exist_ok=True)
    base = {f"{name}.{key}" for name in layers for key in ("weight", "bias")}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in base | frozen}
    save_file(state, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = model.encoder.backbone.peft_config[ADAPTER].to_dict()
    listed = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(listed, indent=2, default=str) + "\n", encoding="utf-8")
    model.config.save_pretrained(folder)
    share_weights(folder)


def _check_published(model: M2FModel) -> None:
    """Raise ModelError unless the base weights are those that `load_backbone_weights` loads."""
    config = model.config
    if not config.backbone_name:
        raise ModelError("an adapter needs a published backbone, and this one started with random weights")
    if config.init_from is None:
        return
    try:
        published = load_pretrained(config.backbone_name, backbone_of(config)).state_dict()
    except (ModelError, OSError):
        logger.warning(
            "the adapter's base is not compared with %r, which could not be loaded: if it was trained in the model "
            "that init_from names, the adapter does not fit the published backbone",
            config.backbone_name,
        )
        return
    own = {name.replace(".base_layer.", "."): one for name, one in model.encoder.backbone.state_dict().items()}
    for name, tensor in published.items():
        if not name.endswith("mask_token") and not torch.equal(own[name].cpu(), tensor):
            raise ModelError(
                f"an adapter needs a published backbone, and {name} of this one, which came from init_from "
                f"{config.init_from!r}, differs from that of {config.backbone_name!r}: it was trained there"
            )


def load_adapter(folder: Path) -> M2FModel:
    """Load what `save_adapter` wrote, onto the backbone it was trained with (loaded from its original source)."""
    model = _with_adapter(folder, _read_config(folder))
    merge(model)
    return model


def load_adapters(folders: Mapping[str, Path]) -> dict[str, M2FModel]:
    """Load several adapters as models that share one backbone in memory, each with its own factors, neck and head.

    Raises ModelError when they were trained on different backbones.
    """
    configs = {name: _read_config(folder) for name, folder in folders.items()}
    depths = {name: backbone_of(one).to_dict().get("num_hidden_layers", 0) for name, one in configs.items()}
    models: dict[str, M2FModel] = {}
    for name in sorted(folders, key=lambda one: -depths[one]):  # the others have some of the deepest one's layers
        models[name] = _with_adapter(folders[name], configs[name], next(iter(models.values()), None))
    return {name: models[name] for name in folders}


def _read_config(folder: Path) -> M2FConfig:
    config = load_config(str(folder))
    if not isinstance(config, M2FConfig):
        raise ModelError(f"{folder} holds a {config.model_type!r} model, not an adapter of m2f_trainer")
    return config


def _with_adapter(folder: Path, config: M2FConfig, base: M2FModel | None = None) -> M2FModel:
    """The model of an adapter, not merged; with `base` it shares that model's backbone weights.

    The names of its tensors say which layers are adapted; peft shortens the list of them in its configuration.
    """
    model = M2FModel(config)
    if base is None:
        load_backbone_weights(model)
    elif base.config.backbone_name != model.config.backbone_name:
        raise ModelError(
            f"{folder} was trained on {model.config.backbone_name!r}, not on {base.config.backbone_name!r} as another"
            " adapter: only adapters of one backbone can share it"
        )
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    state = load_file(folder / ADAPTER_WEIGHTS)
    targets = [name.removeprefix(BACKBONE).partition(".lora_A.")[0] for name in state if ".lora_A." in name]
    _attach(model, LoraSettings(settings["r"], settings["lora_alpha"], settings["lora_dropout"]), targets)
    if base is not None:
        _share_backbone(model, base)
    result = model.load_state_dict(state, strict=False)
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if not name.startswith(BACKBONE))]
    if wrong:
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS} doesn't fit the configuration beside it: {len(wrong)} tensors are missing or "
            f"not part of the model, such as {', '.join(sorted(wrong)[:3])}. Copy the folder again"
        )
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _share_backbone(model: M2FModel, base: M2FModel) -> None:
    """Share the memory of `base`'s backbone weights; the LoRA factors stay the model's own."""
    theirs = {name.replace(".base_layer.", "."): tensor for name, tensor in base.encoder.backbone.named_parameters()}
    for name, parameter in model.encoder.backbone.named_parameters():
        if ".lora_" not in name:
            parameter.data = theirs[name.replace(".base_layer.", ".")].data
