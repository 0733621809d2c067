"""The table of known backbones, and loading of any of them, of any Hub id or folder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from .sources import ModelError as ModelError
from .sources import check_limits, load_config, load_weights, without_kernels

T = TypeVar("T")


@dataclass(frozen=True)
class BackboneRow:
    """One known backbone: its weights' Hub id, geometry and licence."""

    hub_id: str
    stride: int  # image sides must be multiples of it: the patch size of a ViT, 32 for a ConvNeXt
    depth: int  # transformer layers, or stages of a ConvNeXt
    licence: str


def _dinov3(name: str, stride: int, depth: int) -> BackboneRow:
    return BackboneRow(f"facebook/dinov3-{name}-pretrain-lvd1689m", stride, depth, "dinov3-license")


def _dinov2(name: str, depth: int) -> BackboneRow:
    return BackboneRow(f"facebook/dinov2-{name}", 14, depth, "apache-2.0")


BACKBONES: Mapping[str, BackboneRow] = {
    "dinov3-vits16": _dinov3("vits16", 16, 12),
    "dinov3-vits16plus": _dinov3("vits16plus", 16, 12),
    "dinov3-vitb16": _dinov3("vitb16", 16, 12),
    "dinov3-vitl16": _dinov3("vitl16", 16, 24),
    "dinov3-vith16plus": _dinov3("vith16plus", 16, 32),
    "dinov3-vit7b16": _dinov3("vit7b16", 16, 40),
    "dinov3-convnext-tiny": _dinov3("convnext-tiny", 32, 4),
    "dinov3-convnext-small": _dinov3("convnext-small", 32, 4),
    "dinov3-convnext-base": _dinov3("convnext-base", 32, 4),
    "dinov3-convnext-large": _dinov3("convnext-large", 32, 4),
    "dinov2-small": _dinov2("small", 12),
    "dinov2-base": _dinov2("base", 12),
    "dinov2-large": _dinov2("large", 24),
    "dinov2-giant": _dinov2("giant", 40),
    "dinov2-with-registers-small": _dinov2("with-registers-small", 12),
    "dinov2-with-registers-base": _dinov2("with-registers-base", 12),
    "dinov2-with-registers-large": _dinov2("with-registers-large", 24),
    "dinov2-with-registers-giant": _dinov2("with-registers-giant", 40),
}


def hub_id(backbone: str) -> str:
    """Return the Hub id of a table name; a Hub id or a folder is returned as it is."""
    return BACKBONES[backbone].hub_id if backbone in BACKBONES else backbone


def read_config(
    backbone: str | Mapping[str, Any],
    taps: tuple[int, ...] = (),
    drop_path: float = 0.0,
    rope_rescale: float | None = None,
) -> PreTrainedConfig:
    """Return the backbone's configuration, set to output the feature maps that the neck needs.

    `backbone` is a table name, a Hub id, a folder, or the configuration itself as a dictionary with `model_type`.
    `taps` are 1-based depths of a ViT whose maps are used (default: the end of each quarter, as in DINOv2's and
    DINOv3's papers for dense tasks); the layers after the last of them are left out. A ConvNeXt outputs its four
    stages.

    `drop_path` and `rope_rescale` act in training only: see `_set_noise`.

    Raises ModelError when the configuration can't be read; the message names the steps to get access.
    """
    if isinstance(backbone, str):
        config: PreTrainedConfig = _with_advice(backbone, partial(load_config, hub_id(backbone)))
    else:
        fields = dict(backbone)
        if "model_type" not in fields:
            raise ModelError(
                f'a backbone configuration needs "model_type" (such as "dinov3_vit"); got {json.dumps(fields)}'
            )
        check_limits(fields, "the backbone's configuration")
        try:
            config = without_kernels(AutoConfig.for_model(fields.pop("model_type"), **fields))
        except (ValueError, TypeError, StrictDataclassError) as error:
            reason = str(error).partition(". Should contain one of")[0].strip()  # without the list of all models
            raise ModelError(f"transformers rejects this backbone configuration: {reason}") from error
    stages = list(config.to_dict().get("stage_names", ()))
    if not stages:
        raise ModelError(
            f"{config.model_type!r} is not a backbone of transformers: it has no stages to take feature maps from"
        )
    _set_noise(config, drop_path, rope_rescale)
    if is_pyramidal(config):
        if taps:
            raise ModelError(
                f"pyramid_taps are layers of a ViT; {config.model_type!r} gives its four stages. Leave them out"
            )
        config.out_features = stages[-4:]
        return config
    depth = len(stages) - 1
    wrong = [tap for tap in taps if not 1 <= tap <= depth]
    if wrong:
        raise ModelError(f"pyramid_taps {wrong}: this backbone has {depth} layers, so a tap is between 1 and {depth}")
    quarters = (-(-depth * k // 4) for k in (1, 2, 3, 4))
    used = sorted(set(taps or quarters))
    config.num_hidden_layers, config.stage_names = used[-1], stages[: used[-1] + 1]
    config.out_features = [stages[tap] for tap in used]
    return config


def taps_of(config: PreTrainedConfig) -> tuple[int, ...]:
    """The 1-based depths of a ViT whose maps are used; nothing for a ConvNeXt."""
    return () if is_pyramidal(config) else tuple(config.out_indices)


def _set_noise(config: PreTrainedConfig, drop_path: float, rope_rescale: float | None) -> None:
    """Set stochastic depth and RoPE rescaling, the backbone's randomness in training.

    Raises ModelError where the backbone has no such setting.

    DINOv3's pretraining rescales the RoPE coordinates of each batch by a factor of up to 2, and its published
    configurations keep that on in fine-tuning. Practice is mixed; here it is off by default, since large-scale jitter
    already varies the scale, together with the masks.
    """
    known = config.to_dict()
    for name, value in (("drop_path_rate", drop_path), ("pos_embed_rescale", rope_rescale)):
        if value and name not in known:
            raise ModelError(f"a {config.model_type!r} backbone has no {name}, so it can't be set to {value}")
    noise = {"drop_path_rate": drop_path, "pos_embed_rescale": rope_rescale}
    noise |= {"pos_embed_shift": None, "pos_embed_jitter": None}
    for name, value in noise.items():
        if name in known:
            setattr(config, name, value)


def is_pyramidal(config: PreTrainedConfig) -> bool:
    """True when the backbone outputs strides 4, 8, 16 and 32 (ConvNeXt) instead of one stride (ViT)."""
    return "hidden_sizes" in config.to_dict()


def stride_of(config: PreTrainedConfig) -> int:
    """Image sides must be multiples of this: a ViT's patch size, or 32 for a ConvNeXt."""
    patch = 32 if is_pyramidal(config) else config.patch_size
    return int(patch) if isinstance(patch, int) else int(max(patch))


def load_pretrained(backbone: str, config: PreTrainedConfig) -> nn.Module:
    """Return the pretrained backbone with `config`'s taps.

    The class is looked up by configuration, because `AutoBackbone.from_pretrained` contacts the Hub even for a local
    folder. Raises ModelError when the weights can't be loaded or are incomplete.
    """
    loader = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    load = partial(load_weights, loader, hub_id(backbone), lambda name: not name.endswith("mask_token"), config=config)
    model: nn.Module = _with_advice(backbone, load)
    return model


def _with_advice(backbone: str, load: Callable[[], T]) -> T:
    """What `load` returns; its errors name the backbone and the steps to get access."""
    try:
        return load()
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_advice(backbone, hub_id(backbone), error)) from error


def _advice(backbone: str, source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    steps = [f"the backbone {backbone!r} could not be loaded from {source!r}: {first}"]
    if "dinov3" in source.lower():
        steps.append(
            f"DINOv3 weights are gated: accept the licence at https://huggingface.co/{source}, then run "
            "`hf auth login` (or set HF_TOKEN); or use a DINOv2 backbone (such as dinov2-small), which needs no access"
        )
    steps.append(
        f"known names: {', '.join(BACKBONES)}; any Hub id or local folder of a transformers backbone works too"
    )
    return "\n  ".join(steps)
