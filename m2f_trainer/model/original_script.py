"""Checkpoints of DINOv3-Mask2former, the training script that this toolkit takes the place of.

They are transformers' Mask2Former whose encoder was replaced by a DINOv3 model and an adapter. The configuration still
names a Swin; the tensors tell the architecture. Source of the names: Carti-97/DINOv3-Mask2former,
`models/dinov3_mask2former_base.py`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Mask2FormerConfig

from .backbones import BACKBONES, DINOV3, IMAGENET, read_config
from .conversion import config_fields
from .mask2former import M2FConfig, M2FModel
from .sources import ModelError, read_json_file
from .weights import HEAD_FIELDS

logger = logging.getLogger(__name__)

ENCODER = "model.pixel_level_module.encoder."
ADAPTER, BACKBONE = f"{ENCODER}adapter.", f"{ENCODER}model."
HEADS = {192: "facebook/mask2former-swin-large-coco-instance", 96: "facebook/mask2former-swin-small-coco-instance"}
"""Channels of the adapter's first map -> the published head that the script started from."""


def load_original(folder: str, config: Mask2FormerConfig) -> M2FModel | None:
    """A model of ours with the weights of the script's checkpoint; None if the folder holds another Mask2Former.

    Raises:
        ModelError: its weights are damaged or are not those of the script's architecture.
    """
    path = Path(folder, "model.safetensors")
    if not path.is_file():
        return None
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ModelError(f"the weights in {folder!r} are damaged ({error}). Copy the file again") from error
    if f"{ADAPTER}projections.0.weight" not in saved:
        return None
    tensors = {_our_name(name): tensor for name, tensor in saved.items() if not name.startswith("criterion.")}
    model = M2FModel(_config_of(folder, config, saved, tensors))
    if not model.config.last_norm:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{ENCODER}backbone.norm.")}
    own = {name for name in model.state_dict() if not name.endswith("mask_token")}
    given = {name for name in tensors if not name.endswith("mask_token")}
    if wrong := sorted(own ^ given):
        raise ModelError(
            f"{folder!r} looks like a checkpoint of DINOv3-Mask2former, but {len(wrong)} tensors are missing or "
            f"unknown, such as {', '.join(wrong[:3])}. Copy the folder again"
        )
    model.load_state_dict(tensors, strict=False)
    evaluated: M2FModel = model.eval()  # type: ignore[no-untyped-call]
    return evaluated


def _our_name(name: str) -> str:
    """Ours of the script's name; in transformers up to 4.57 a DINOv3's layers were `layer`, now `model.layer`."""
    if name.startswith(ADAPTER):
        return f"{ENCODER}neck.{name.removeprefix(ADAPTER)}"
    if name.startswith(BACKBONE):
        inner = name.removeprefix(BACKBONE)
        return f"{ENCODER}backbone.{'model.' if inner.startswith('layer.') else ''}{inner}"
    return name


def _config_of(
    folder: str, config: Mask2FormerConfig, saved: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> M2FConfig:
    """The configuration: fields of the head from the script's, backbone and neck from the tensors.

    The script read hidden states before the last norm; transformers up to 4.57 normed the last of them.
    """
    start = f"{ENCODER}backbone."
    inner = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    is_old = f"{BACKBONE}layer.0.norm1.weight" in saved
    channels = [saved[f"{ADAPTER}projections.{stage}.weight"].shape[0] for stage in range(4)]
    is_pyramid = f"{ADAPTER}resamplers.1.weight" in saved
    shown = read_json_file(folder, "preprocessor_config.json") or {}
    size = shown.get("size") or {}
    categories = _categories(config, shown)
    fields = config_fields(inner)
    row = {
        (384, 12, False): "dinov3-vits16",
        (384, 12, True): "dinov3-vits16plus",
        (768, 12, False): "dinov3-vitb16",
        (1024, 24, False): "dinov3-vitl16",
        (1280, 32, True): "dinov3-vith16plus",
    }.get((fields["hidden_size"], fields["num_hidden_layers"], fields["use_gated_mlp"]))
    given = {name: value for name, value in config.to_dict().items() if name in HEAD_FIELDS}
    return M2FConfig(
        **given,
        backbone_config=read_config({**fields, "apply_layernorm": False}),
        backbone_name=BACKBONES[row].hub_id if row else "dinov3",
        backbone_licence=DINOV3,
        head_checkpoint=HEADS.get(channels[0]),
        neck="script_pyramid" if is_pyramid else "script_plain",
        neck_channels=channels,
        last_norm=is_old,
        image_height=int(size.get("height", 384)),
        image_width=int(size.get("width", 384)),
        image_mean=shown.get("image_mean") or IMAGENET[0],
        image_std=shown.get("image_std") or IMAGENET[1],
        categories=categories,
        id2label={row: one["name"] for row, one in enumerate(categories)},
        label2id={one["name"]: row for row, one in enumerate(categories)},
    )


def _categories(config: Mask2FormerConfig, shown: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A category for each row of the class head, from the names in the configuration.

    The script used category ids as rows, less one with `do_reduce_labels`. The row after the last is "no object".
    """
    names = {int(row): str(name) for row, name in (config.id2label or {}).items()}
    shift = 1 if shown.get("do_reduce_labels") or shown.get("reduce_labels") else 0
    if shift:
        logger.warning("the script trained with do_reduce_labels: category ids are its class numbers plus 1")
    lost = [name for row, name in names.items() if row >= len(names)]
    if lost:
        logger.warning(
            "the script's classes were numbered from %s to %s, so that %s shared its scores with \"no object\" or was "
            "never learnt; it is left out. Train anew for right results.", min(names), max(names), ", ".join(lost),
        )  # fmt: skip
    return [{"id": row + shift, "name": names.get(row, f"unused {row}")} for row in range(len(names))]
