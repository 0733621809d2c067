"""The table of known backbones, and loading of any of them, of any Hub id or folder."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from .conversion import FILES, foreign_file, load_foreign, timm_config
from .sources import ModelError as ModelError
from .sources import check_limits, load_config, load_weights, read_json_file, with_floats, without_kernels

logger = logging.getLogger(__name__)
T = TypeVar("T")

STRIDES = (4, 8, 16, 32)
"""Those of Mask2Former's four maps."""
Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the channels that most backbones were trained with, of values from 0 to 1."""
SATELLITE: Normalization = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
"""The same of DINOv3's satellite weights (the model cards of facebook/dinov3-*-sat493m)."""
DINOV3, EUPE, APACHE = "dinov3-license", "fair-noncommercial-research-license", "apache-2.0"
"""Licences of the backbones' weights."""


@dataclass(frozen=True)
class BackboneRow:
    """One known backbone: where its weights are, its geometry, its licence and how images are normalised."""

    hub_id: str
    stride: int  # image sides must be multiples of it: the patch size of a ViT, 32 for a backbone of four stages
    layers: int  # of a ViT; 0 for a backbone of four stages
    licence: str
    ungated: str = ""  # Hub id of the same weights in timm's format, where `hub_id` needs access
    file: str = ""  # how the name of Meta's file begins
    normalization: Normalization = IMAGENET  # mean and standard deviation


def _dinov3(name: str, layers: int, timm: str, data: str = "lvd1689m") -> BackboneRow:
    file = f"dinov3_{name.replace('-', '_')}_pretrain_{data}"
    normalization = SATELLITE if data == "sat493m" else IMAGENET
    stride = 16 if layers else 32
    return BackboneRow(
        f"facebook/dinov3-{name}-pretrain-{data}", stride, layers, DINOV3, f"timm/{timm}{data}", file, normalization
    )


def _dinov2(name: str, layers: int) -> BackboneRow:
    return BackboneRow(f"facebook/dinov2-{name}", 14, layers, APACHE)


def _lingbot(size: str, layers: int) -> BackboneRow:
    return BackboneRow(f"belfner/vit_{size}_patch16_lingbot.robbyant", 16, layers, APACHE)


def _swin(name: str) -> BackboneRow:
    return BackboneRow(f"microsoft/swin-{name}", 32, 0, APACHE)


def _eupe(name: str, layers: int) -> BackboneRow:
    return BackboneRow(f"timm/{name}.eupe_lvd1689m", 16 if layers else 32, layers, EUPE)


BACKBONES: Mapping[str, BackboneRow] = {
    "dinov3-vits16": _dinov3("vits16", 12, "vit_small_patch16_dinov3_qkvb."),
    "dinov3-vits16plus": _dinov3("vits16plus", 12, "vit_small_plus_patch16_dinov3_qkvb."),
    "dinov3-vitb16": _dinov3("vitb16", 12, "vit_base_patch16_dinov3_qkvb."),
    "dinov3-vitl16": _dinov3("vitl16", 24, "vit_large_patch16_dinov3_qkvb."),
    "dinov3-vith16plus": _dinov3("vith16plus", 32, "vit_huge_plus_patch16_dinov3_qkvb."),
    "dinov3-vit7b16": _dinov3("vit7b16", 40, "vit_7b_patch16_dinov3."),
    "dinov3-vitl16-sat493m": _dinov3("vitl16", 24, "vit_large_patch16_dinov3_qkvb.", "sat493m"),
    "dinov3-vit7b16-sat493m": _dinov3("vit7b16", 40, "vit_7b_patch16_dinov3.", "sat493m"),
    "dinov3-convnext-tiny": _dinov3("convnext-tiny", 0, "convnext_tiny.dinov3_"),
    "dinov3-convnext-small": _dinov3("convnext-small", 0, "convnext_small.dinov3_"),
    "dinov3-convnext-base": _dinov3("convnext-base", 0, "convnext_base.dinov3_"),
    "dinov3-convnext-large": _dinov3("convnext-large", 0, "convnext_large.dinov3_"),
    "dinov2-small": _dinov2("small", 12),
    "dinov2-base": _dinov2("base", 12),
    "dinov2-large": _dinov2("large", 24),
    "dinov2-giant": _dinov2("giant", 40),
    "dinov2-with-registers-small": _dinov2("with-registers-small", 12),
    "dinov2-with-registers-base": _dinov2("with-registers-base", 12),
    "dinov2-with-registers-large": _dinov2("with-registers-large", 24),
    "dinov2-with-registers-giant": _dinov2("with-registers-giant", 40),
    "lingbot-vits16": _lingbot("small", 12),
    "lingbot-vitb16": _lingbot("base", 12),
    "lingbot-vitl16": _lingbot("large", 24),
    "lingbot-vitg16": _lingbot("giant", 40),
    "swin-tiny": _swin("tiny-patch4-window7-224"),
    "swin-small": _swin("small-patch4-window7-224"),
    "swin-base": _swin("base-patch4-window12-384-in22k"),
    "swin-large": _swin("large-patch4-window12-384-in22k"),
    "eupe-vitt16": _eupe("vit_tiny_patch16_dinov3_qkvb", 12),
    "eupe-vits16": _eupe("vit_small_patch16_dinov3_qkvb", 12),
    "eupe-vitb16": _eupe("vit_base_patch16_dinov3_qkvb", 12),
    "eupe-convnext-tiny": _eupe("convnext_tiny", 0),
    "eupe-convnext-small": _eupe("convnext_small", 0),
    "eupe-convnext-base": _eupe("convnext_base", 0),
}


def hub_id(backbone: str) -> str:
    """Return the Hub id of a table name; a Hub id, folder or file is returned as it is."""
    return BACKBONES[backbone].hub_id if backbone in BACKBONES else backbone


def find_row(backbone: str) -> BackboneRow | None:
    """The table's row of a table name, of a Hub id, or of a file or folder with a published name; None if unknown."""
    if backbone in BACKBONES:
        return BACKBONES[backbone]
    path = Path(backbone)
    if path.is_absolute() or path.exists():
        return _row_published_as(path.name)
    ids = ((row, (row.hub_id, row.ungated)) for row in BACKBONES.values())
    return next((row for row, own in ids if _without_variant(backbone) in map(_without_variant, own)), None)


def _row_published_as(name: str) -> BackboneRow | None:
    """The row whose repository has this name, or whose file's name begins as this one."""
    for row in BACKBONES.values():
        repositories = [_without_variant(Path(one).name) for one in (row.hub_id, row.ungated) if one]
        if _without_variant(name) in repositories or (row.file and name.startswith(row.file)):
            return row
    return None


def _without_variant(timm_name: str) -> str:
    """timm publishes the same weights with biases of queries and values that are zero ("_qkvb") and without."""
    return timm_name.replace("_qkvb.", ".")


def read_config(
    backbone: str | Mapping[str, Any],
    taps: tuple[int, ...] = (),
    drop_path: float = 0.0,
    rope_rescale: float | None = None,
) -> PreTrainedConfig:
    """Return the backbone's configuration, set to output the feature maps that the neck needs.

    `backbone` is a table name, a Hub id, a folder, or the configuration itself as a dictionary with `model_type`.
    `taps` are 1-based depths of a ViT whose maps are used (default: the end of each quarter, as in DINOv2's and
    DINOv3's papers for dense tasks); the layers after the last of them are left out. A Swin or a ConvNeXt outputs its
    four stages.

    `drop_path` and `rope_rescale` act in training only: see `set_noise`.

    Raises ModelError when the configuration can't be read; the message names the steps to get access.
    """
    if isinstance(backbone, str):
        config = _with_advice(backbone, partial(_published_config, hub_id(backbone)))
    else:
        config = _config_of(backbone)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise ModelError(
            f"{config.model_type!r} is not a backbone of transformers: it has no stages to take feature maps from"
        )
    if config.model_type == "timm_backbone":
        raise ModelError(
            "'timm_backbone' needs the package timm wherever the model is used. Give timm's weights with DINOv3's "
            "architecture as timm/NAME, which are converted, or a backbone of transformers"
        )
    set_noise(config, drop_path, rope_rescale)
    stages = list(config.to_dict().get("stage_names") or ())
    config.out_features = after_stem = [name for name in stages if name != "stem"]
    strides = [one.stride for one in feature_maps(config)]
    if len(set(strides)) > 1:
        return _with_stages(config, taps, dict(zip(strides, after_stem, strict=True)))
    depth = len(stages) - 1
    wrong = [tap for tap in taps if not 1 <= tap <= depth]
    if wrong:
        raise ModelError(f"pyramid_taps {wrong}: this backbone has {depth} layers, so a tap is between 1 and {depth}")
    quarters = (-(-depth * k // 4) for k in (1, 2, 3, 4))
    used = sorted(set(taps or quarters))
    config.num_hidden_layers, config.stage_names = used[-1], stages[: used[-1] + 1]
    config.out_features = [stages[tap] for tap in used]
    return config


def _with_stages(config: PreTrainedConfig, taps: tuple[int, ...], last: Mapping[int, str]) -> PreTrainedConfig:
    """The configuration set to output the last stage of each stride: `last` maps strides to stages."""
    if taps:
        raise ModelError(
            f"pyramid_taps are layers of a ViT; {config.model_type!r} gives its four stages. Leave them out"
        )
    if not last.keys() >= set(STRIDES):
        raise ModelError(
            f"a {config.model_type!r} backbone gives feature maps of the strides {sorted(last)}; Mask2Former needs "
            f"those of {', '.join(map(str, STRIDES))}, or a ViT, whose maps have one stride"
        )
    config.out_features = [last[stride] for stride in STRIDES]
    return config


@dataclass(frozen=True)
class FeatureMap:
    """One of a backbone's outputs."""

    channels: int
    stride: int


def feature_maps(config: PreTrainedConfig, size: tuple[int, int] | None = None) -> tuple[FeatureMap, ...]:
    """The feature maps that a backbone of this configuration outputs, found by running it on torch's meta device.

    `size` is that of the images, (height, width); default: one that all common patch sizes divide, or else the
    configuration's `image_size`.

    Raises ModelError where the backbone can't run, or its maps have no whole stride.
    """
    given, key = config.to_dict(), f"{size} {config.to_json_string(use_diff=False)}"
    if key not in _FEATURE_MAPS:
        patches = given.get("patch_size") or 1
        side = 2 * math.lcm(32, *([patches] if isinstance(patches, int) else patches))
        own = given.get("image_size") or side
        sizes = [size] if size else [(side, side), (own, own) if isinstance(own, int) else (own[0], own[1])]
        _FEATURE_MAPS[key] = _run_on_meta(config, sizes)
    return _FEATURE_MAPS[key]


_FEATURE_MAPS: dict[str, tuple[FeatureMap, ...]] = {}
"""Results of `feature_maps`, because a backbone takes up to a second to build."""


def _run_on_meta(config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> tuple[FeatureMap, ...]:
    """The feature maps for images of the first of `sizes` that the backbone takes."""
    reasons = {}
    for height, width in sizes:
        try:
            with torch.device("meta"):
                backbone = AutoBackbone.from_config(deepcopy(config)).eval()
            with torch.no_grad():  # not on "meta" by default: transformers keeps some tensors for later calls
                maps = backbone(torch.zeros(1, 3, height, width, device="meta")).feature_maps
            return tuple(FeatureMap(one.shape[1], _stride(one, height, width)) for one in maps)
        except Exception as error:  # the backbones of transformers fail in many ways
            reasons[height, width] = (str(error).strip() or type(error).__name__).splitlines()[0]
    found = "; ".join(f"{height} x {width}: {reason}" for (height, width), reason in reasons.items())
    raise ModelError(f"a {config.model_type!r} backbone of this configuration can't be run on images of {found}")


def _stride(found: Tensor, height: int, width: int) -> int:
    strides = {side / own for side, own in zip((height, width), found.shape[2:], strict=True)}
    if len(strides) != 1 or not min(strides).is_integer():
        raise ValueError(f"its feature map has {tuple(found.shape[2:])} positions, no whole number of pixels each")
    return int(strides.pop())


def _published_config(source: str) -> PreTrainedConfig:
    """The configuration of a Hub id, folder or file; that of weights in Meta's or timm's format from their shapes."""
    file = foreign_file(source)
    return load_config(source) if file is None else _config_of(load_foreign(file, "meta")[0])


def _config_of(given: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration from its fields. Raises ModelError where transformers rejects them."""
    fields = dict(given)
    if "model_type" not in fields:
        raise ModelError(
            f'a backbone configuration needs "model_type" (such as "dinov3_vit"); got {json.dumps(fields)}'
        )
    check_limits(fields, "the backbone's configuration")
    try:
        return without_kernels(AutoConfig.for_model(fields.pop("model_type"), **fields))
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).partition(". Should contain one of")[0].strip()  # without the list of all models
        raise ModelError(f"transformers rejects this backbone configuration: {reason}") from error


def taps_of(config: PreTrainedConfig) -> tuple[int, ...]:
    """The 1-based depths of a ViT whose maps are used; nothing for a backbone of four stages."""
    return () if is_pyramidal(config) else tuple(config.out_indices)


def set_noise(config: PreTrainedConfig, drop_path: float, rope_rescale: float | None) -> None:
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
    noise = {"drop_path_rate": float(drop_path), "pos_embed_rescale": with_floats(rope_rescale, float)}
    noise |= {"pos_embed_shift": None, "pos_embed_jitter": None}
    for name, value in noise.items():
        if name in known:
            setattr(config, name, value)


def is_pyramidal(config: PreTrainedConfig) -> bool:
    """True when the backbone outputs strides 4, 8, 16 and 32 (Swin, ConvNeXt) instead of one stride (ViT)."""
    return len({one.stride for one in feature_maps(config)}) > 1


def stride_of(config: PreTrainedConfig) -> int:
    """Image sides must be multiples of this: a ViT's patch size, or 32 for a backbone of four stages."""
    return max(one.stride for one in feature_maps(config))


def normalization_of(backbone: str) -> Normalization:
    """Mean and standard deviation of the channels, of values from 0 to 1, that a published backbone was trained with.

    They come from the table, or from the source: `config.json` of timm or `preprocessor_config.json`. `IMAGENET` where
    neither says anything. Raises ModelError for values that can't be used.
    """
    row = find_row(backbone)
    if row is not None and not Path(backbone).is_dir():
        return row.normalization
    stated = None if backbone.endswith(FILES) else _with_advice(backbone, partial(_stated_normalization, backbone))
    if stated is None and row is None:
        logger.warning("%s doesn't say how its images were normalised: taken as ImageNet's", backbone)
    return stated or (row.normalization if row else IMAGENET)


def _stated_normalization(source: str) -> Normalization | None:
    """Mean and standard deviation in a source's own files, brought to values from 0 to 1; None if it has none."""
    timm = timm_config(source)
    fields = timm.get("pretrained_cfg") or {} if timm else read_json_file(source, "preprocessor_config.json") or {}
    mean, std = (fields.get("mean"), fields.get("std")) if timm else (fields.get("image_mean"), fields.get("image_std"))
    if mean is None or std is None or not fields.get("do_normalize", True):
        return None
    scale = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
    try:
        (*means,), (*stds,) = ([float(value) / (255 * scale) for value in values] for values in (mean, std))
        if len(means) == len(stds) == 3 and all(map(math.isfinite, means)) and all(0 < one < math.inf for one in stds):
            return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
    except (TypeError, ValueError, ZeroDivisionError):
        pass
    raise ModelError(
        f"{source!r} states the mean {mean} and the standard deviation {std} of its training images: expected three "
        "numbers each, the latter above 0. Correct its preprocessor_config.json"
    )


def licence_of(backbone: str) -> str:
    """The licence of a published backbone's weights, from the table or from timm's `config.json`; "" if unknown."""
    row, stated = find_row(backbone), dict[str, Any]()
    if row is None and not backbone.endswith(FILES):
        timm = _with_advice(backbone, partial(timm_config, backbone)) or {}
        stated = timm.get("pretrained_cfg") or {}
        row = _row_published_as(f"{timm.get('architecture')}.{stated.get('tag')}")
    return row.licence if row else str(stated.get("license") or "")


def load_pretrained(backbone: str, config: PreTrainedConfig) -> nn.Module:
    """Return the pretrained backbone with `config`'s taps.

    The class is looked up by configuration, because `AutoBackbone.from_pretrained` contacts the Hub even for a local
    folder. Raises ModelError when the weights can't be loaded or are incomplete.
    """
    model: nn.Module = _with_advice(backbone, partial(_load_published, hub_id(backbone), config))
    return model


def _load_published(source: str, config: PreTrainedConfig) -> nn.Module:
    backbone_class: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    file = foreign_file(source)
    if file is None:
        loaded: nn.Module = load_weights(backbone_class, source, _is_needed, config=config)
        return loaded
    model: nn.Module = backbone_class(config)
    own = model.state_dict()
    tensors = {name: tensor for name, tensor in load_foreign(file)[1].items() if not _after_last_tap(name, config)}
    needed = {name for name, tensor in own.items() if tensor.numel() and _is_needed(name)}
    if wrong := sorted(needed ^ tensors.keys()):
        raise ModelError(
            f"{source!r} doesn't fit the configuration of the backbone: {len(wrong)} tensors are missing or not part "
            f"of it, such as {', '.join(wrong[:3])}. Copy the file again"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ModelError(
                f"{source!r} doesn't fit the configuration of the backbone: {name} has the shape {list(tensor.shape)} "
                f"instead of {list(own[name].shape)}. Copy the file again"
            )
    model.load_state_dict(tensors, strict=False)
    return model


def _after_last_tap(name: str, config: PreTrainedConfig) -> bool:
    return name.startswith("model.layer.") and int(name.split(".")[2]) >= config.num_hidden_layers


def _is_needed(name: str) -> bool:
    """False for the mask token, used in pretraining only, and the norms of the outputs, new in every backbone."""
    return not name.endswith("mask_token") and "hidden_states_norms." not in name


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
    row = find_row(backbone)
    if row is not None and row.hub_id == source and row.ungated:
        steps.append(
            f"its weights are gated: accept the licence at https://huggingface.co/{source}, then run `hf auth login` "
            "(or set HF_TOKEN)"
        )
        steps.append(f"the same weights need no access, under the same licence, as --backbone {row.ungated}")
        steps.append(
            f"or as Meta's own file, --backbone .../{row.file}-*.pth, from "
            "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
        )
        steps.append("backbones with an open licence: dinov2-small, lingbot-vits16 and the larger ones of these names")
    if source.count("/") == 1 and not Path(source).exists():
        steps.append(
            "if this machine can't reach the Hub, download config.json and model.safetensors from "
            f"https://huggingface.co/{source} on another one and give their folder: --backbone FOLDER. A file of "
            "Meta's or timm's weights works without the configuration: --backbone FILE.pth or FILE.safetensors"
        )
    steps.append(
        f"known names: {', '.join(BACKBONES)}; any Hub id or local folder of a transformers backbone works too, and "
        "weights with DINOv3's architecture in timm's or Meta's format"
    )
    return "\n  ".join(steps)
