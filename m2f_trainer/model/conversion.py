"""Backbones in the formats of Meta and timm, converted to transformers' modules.

Meta publishes DINOv3 as `.pth` files, and timm the same weights as safetensors without an access request. Both name the
tensors of the same ViT and ConvNeXt differently. A format is one table that renames tensors; the configuration follows
from their shapes. timm is not needed. Sources of the names: facebookresearch/dinov3 (`models/vision_transformer.py`,
`models/convnext.py`), timm (`models/eva.py`, `models/convnext.py`), and transformers' `convert_dinov3_vit_to_hf.py`.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from .sources import ModelError, read_json_file

FILES = (".pth", ".pt", ".safetensors")
ROPE_BASE = 100.0
"""Base of the periods of the rotary position embedding of every published model of these formats."""


@dataclass(frozen=True)
class Format:
    """One format: `mark` is the name of a tensor that no other format has."""

    name: str
    mark: str
    renames: Mapping[str, str | None]
    """Pattern of a full name -> name in transformers' backbone; None for tensors that feature maps don't need."""


_VIT = {
    r"cls_token": r"embeddings.cls_token",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.\1",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"model.layer.\1.norm\2.\3",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"model.layer.\1.attention.qkv.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"model.layer.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"model.layer.\1.mlp.up_proj.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"model.layer.\1.mlp.down_proj.\2",
    r"norm\.(weight|bias)": r"norm.\1",
}
_STAGES = {
    r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:dwconv|conv_dw)\.(weight|bias)": (
        r"model.stages.\1.layers.\2.depthwise_conv.\3"
    ),
    r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.norm\.(weight|bias)": r"model.stages.\1.layers.\2.layer_norm.\3",
    r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:pwconv|mlp\.fc)([12])\.(weight|bias)": (
        r"model.stages.\1.layers.\2.pointwise_conv\3.\4"
    ),
    r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.gamma": r"model.stages.\1.layers.\2.gamma",
}
FORMATS = (
    Format(
        "a ViT of Meta",
        "blocks.0.ls1.gamma",
        {
            **_VIT,
            r"storage_tokens": r"embeddings.register_tokens",
            r"blocks\.(\d+)\.ls([12])\.gamma": r"model.layer.\1.layer_scale\2.lambda1",
            r"blocks\.(\d+)\.mlp\.w1\.(weight|bias)": r"model.layer.\1.mlp.gate_proj.\2",
            r"blocks\.(\d+)\.mlp\.w2\.(weight|bias)": r"model.layer.\1.mlp.up_proj.\2",
            r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)": r"model.layer.\1.mlp.down_proj.\2",
            r"mask_token|rope_embed\.periods|.*\.bias_mask|(local_)?cls_norm\..*|projectors\..*": None,
        },
    ),
    Format(
        "a ViT of timm",
        "blocks.0.gamma_1",
        {
            **_VIT,
            r"reg_token": r"embeddings.register_tokens",
            r"blocks\.(\d+)\.attn\.([qv])_bias": r"model.layer.\1.attention.\2_proj.bias",
            r"blocks\.(\d+)\.gamma_([12])": r"model.layer.\1.layer_scale\2.lambda1",
            r"blocks\.(\d+)\.mlp\.fc1_g\.(weight|bias)": r"model.layer.\1.mlp.gate_proj.\2",
            r"blocks\.(\d+)\.mlp\.fc1_x\.(weight|bias)": r"model.layer.\1.mlp.up_proj.\2",
            r"head\..*": None,
        },
    ),
    Format(
        "a ConvNeXt of Meta",
        "downsample_layers.0.0.weight",
        {
            **_STAGES,
            r"downsample_layers\.(\d+)\.([01])\.(weight|bias)": r"model.stages.\1.downsample_layers.\2.\3",
            r"norms?\..*|head\..*|projectors\..*": None,
        },
    ),
    Format(
        "a ConvNeXt of timm",
        "stages.0.blocks.0.conv_dw.weight",
        {
            **_STAGES,
            r"stem\.([01])\.(weight|bias)": r"model.stages.0.downsample_layers.\1.\2",
            r"stages\.(\d+)\.downsample\.([01])\.(weight|bias)": r"model.stages.\1.downsample_layers.\2.\3",
            r"head\..*": None,
        },
    ),
)


def foreign_file(source: str) -> Path | None:
    """The file of weights in one of `FORMATS` at a file, a folder or a Hub id; None for a model of transformers.

    Raises:
        OSError: there is no such folder or Hub id.
        ModelError: there is no such file.
    """
    if source.endswith(FILES):
        if not Path(source).is_file():
            raise ModelError(f"there is no file {source!r}. Correct the path of the backbone's weights")
        return Path(source)
    if timm_config(source) is None:
        return None
    return Path(str(cached_file(source, "model.safetensors")))


def timm_config(source: str) -> dict[str, Any] | None:
    """The `config.json` of a folder or Hub id if timm wrote it, with "architecture" and "pretrained_cfg"."""
    fields = read_json_file(source, "config.json") or {}
    return fields if "architecture" in fields and "model_type" not in fields else None


def load_foreign(path: Path, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration fields and the float32 tensors of a file of `FORMATS`, for transformers' backbone.

    On the device "meta" the tensors have shapes only, and little of the file is read.

    Raises:
        ModelError: the file is damaged, or the architecture is not DINOv3's.
    """
    tensors = read_tensors(path, device)
    converted = convert(tensors, str(path))
    head_size = head_size_of(tensors, str(path))
    try:
        return config_fields(converted, head_size), converted
    except KeyError as error:
        raise ModelError(f"{str(path)!r} lacks the tensor {error} (transformers' name). Copy it again") from error


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or a `.pth` file; on the device "meta" their names and shapes only.

    Nothing but tensors is unpickled. Raises ModelError for a damaged file and for one that holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                if device == "meta":
                    return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
                return {name: file.get_tensor(name) for name in names}
        found = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{str(path)!r} can't be read: {first}\n  It is damaged, or holds Python objects, which are never run. "
            "Expected a file of tensors, as Meta and timm publish them: copy it again"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ModelError(
            f"{str(path)!r} holds no plain dictionary of tensors. Expected a backbone as Meta publishes it, not the "
            "checkpoint of a training run"
        )
    return found


def convert(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a backbone under the names of transformers' DINOv3 backbones, in float32.

    The fused matrix of queries, keys and values, (3 C, C), becomes three of (C, C). Where Meta masks the bias of the
    keys (`bias_mask`), it is left out.

    Raises:
        ModelError: the tensors are none of `FORMATS`, or some of them belong to another architecture.
    """
    one = next((one for one in FORMATS if one.mark in tensors), None)
    if one is None:
        raise ModelError(
            f"{source!r} is no backbone of a known format: it holds tensors such as {', '.join(list(tensors)[:3])}. "
            f"Expected {', '.join(known.name for known in FORMATS)} with DINOv3's architecture, or a model of "
            "transformers"
        )
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        matches = ((re.fullmatch(pattern, name), new) for pattern, new in one.renames.items())
        match, new = next((found for found in matches if found[0]), (None, None))
        if match is None:
            unknown.append(name)
        elif new is not None:
            converted[match.expand(new)] = tensor.float()
    if unknown:
        raise ModelError(
            f"{source!r} looks like {one.name}, but {len(unknown)} of its tensors have no place in DINOv3's "
            f"architecture, such as {', '.join(unknown[:3])}. Use weights of DINOv3 or of a model with its architecture"
        )
    masked = any(name.endswith(".bias_mask") for name in tensors)
    for name in [name for name in converted if ".attention.qkv." in name]:
        for part, tensor in zip("qkv", converted.pop(name).chunk(3), strict=True):
            if not (masked and part == "k" and name.endswith(".bias")):
                converted[name.replace(".qkv.", f".{part}_proj.")] = tensor
    return converted


def config_fields(converted: Mapping[str, Tensor], head_size: int | None = None) -> dict[str, Any]:
    """The fields of transformers' configuration for converted tensors, from their names and shapes.

    `head_size` is the width of an attention head, which shapes don't show. Default: that of the published models, 128
    for a width of 4096 and 64 for others.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    if not any(name.startswith("model.layer.") for name in shapes):
        stages = 1 + max(int(name.split(".")[2]) for name in shapes)
        return {
            "model_type": "dinov3_convnext",
            "hidden_sizes": [shapes[f"model.stages.{stage}.layers.0.gamma"][0] for stage in range(stages)],
            "depths": [
                sum(bool(re.fullmatch(rf"model\.stages\.{stage}\.layers\.\d+\.gamma", name)) for name in shapes)
                for stage in range(stages)
            ],
        }
    width, _, patch, _ = shapes["embeddings.patch_embeddings.weight"]
    layer = "model.layer.0."
    gated = f"{layer}mlp.gate_proj.weight" in shapes
    return {
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".layer_scale1.lambda1") for name in shapes),
        "num_attention_heads": width // (head_size or (128 if width == 4096 else 64)),
        "intermediate_size": shapes[f"{layer}mlp.up_proj.weight"][0],
        "patch_size": patch,
        "num_register_tokens": shapes.get("embeddings.register_tokens", (1, 0))[1],
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": f"{layer}attention.q_proj.bias" in shapes,
        "key_bias": f"{layer}attention.k_proj.bias" in shapes,
        "value_bias": f"{layer}attention.v_proj.bias" in shapes,
        "proj_bias": f"{layer}attention.o_proj.bias" in shapes,
        "mlp_bias": f"{layer}mlp.up_proj.bias" in shapes,
        "rope_theta": ROPE_BASE,
        "layer_norm_eps": 1e-5,
    }


def head_size_of(tensors: Mapping[str, Tensor], source: str) -> int | None:
    """The width of an attention head from the rotary periods in Meta's files, a quarter of it; None without them.

    The periods themselves are computed anew in float32, as transformers and timm do: the files hold them in bfloat16.
    Raises ModelError where they are not those of `ROPE_BASE`.
    """
    periods = tensors.get("rope_embed.periods")
    if periods is None:
        return None
    count = len(periods)
    expected = ROPE_BASE ** (torch.arange(count) / count)
    if periods.device.type != "meta" and not torch.allclose(periods.float(), expected, rtol=1e-2):
        raise ModelError(
            f"{source!r} was trained with other periods of the rotary position embedding ({periods[:3].tolist()}, ...) "
            f"than DINOv3 ({expected[:3].tolist()}, ...), which transformers can't represent. Use another backbone"
        )
    return 4 * count
