"""The encoder: a backbone and a neck that turns its features into Mask2Former's four maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig

from .attention import NAME as ATTENTION
from .backbones import ModelError, feature_maps, is_pyramidal


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map, as in ViTDet's pyramid: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise each position's channels: (B, C, h, w) -> (B, C, h, w).

        Computed in the precision of its weights, as under CUDA's autocast: the gradients of weight and bias are sums
        over all positions, which lose most of their digits on a CPU in bfloat16.
        """
        wide = features.permute(0, 2, 3, 1).to(self.norm.weight.dtype)
        normalised: Tensor = self.norm(wide).permute(0, 3, 1, 2)
        return normalised


def channels_last(features: Tensor) -> Tensor:
    """Store maps (B, C, h, w) channels-last on a CPU; elsewhere return them unchanged. The values stay the same.

    Convolutions keep this memory layout, and `ChannelNorm` needs it. So no map is transposed between them.
    """
    return features.contiguous(memory_format=torch.channels_last) if features.device.type == "cpu" else features


class SimplePyramid(nn.Module):
    """ViT maps of one stride p -> maps of strides p/4, p/2, p and 2p.

    The simple feature pyramid of ViTDet (Li et al. 2022, https://arxiv.org/abs/2203.16527, section 3): every scale is
    made from the last map alone by (transposed) convolution. Several taps are first fused by a learned 1x1 convolution.
    """

    def __init__(self, dim: int, taps: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(dim * taps, dim, 1) if taps > 1 else nn.Identity()
        half, quarter = dim // 2, dim // 4
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, half, 2, 2),
                    ChannelNorm(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                    *_projection(quarter, channels[0]),
                ),
                nn.Sequential(nn.ConvTranspose2d(dim, half, 2, 2), *_projection(half, channels[1])),
                nn.Sequential(*_projection(dim, channels[2])),
                nn.Sequential(nn.MaxPool2d(2, 2), *_projection(dim, channels[3])),
            ]
        )

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """Taps of (B, dim, h, w) -> [(B, C0, 4h, 4w), (B, C1, 2h, 2w), (B, C2, h, w), (B, C3, h/2, w/2)]."""
        fused = self.fuse(channels_last(torch.cat(tuple(maps), dim=1)))
        return [scale(fused) for scale in self.scales]


def _projection(inputs: int, outputs: int) -> list[nn.Module]:
    """ViTDet's 1x1 and 3x3 convolution, each followed by a norm."""
    return [
        nn.Conv2d(inputs, outputs, 1, bias=False),
        ChannelNorm(outputs),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        ChannelNorm(outputs),
    ]


class ConvStem(nn.Module):
    """A small convolutional network on the image that preserves detail below the patch size: strides 4, 8 and 16.

    After the spatial prior module of ViT-Adapter (Chen et al. 2023, https://arxiv.org/abs/2205.08534, section 3.2),
    with fewer layers, and the layer norms of the pyramid instead of batch norms.
    """

    widths = (32, 64, 96, 128)

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        inputs = (3, *self.widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), ChannelNorm(o), nn.GELU())
            for i, o in zip(inputs, self.widths, strict=True)
        )
        self.outputs = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(self.widths[1:], channels[:3], strict=True))

    def forward(self, pixel_values: Tensor, finest: torch.Size) -> list[Tensor]:
        """Images (B, 3, H, W) and the finest map's (4h, 4w) -> [(B, C0, 4h, 4w), (B, C1, 2h, 2w), (B, C2, h, w)].

        The image is first resized to four times the finest map: its own size when the patch size is 16.
        """
        size = [4 * side for side in finest]
        shrinks = size[0] < pixel_values.shape[-2]  # antialias changes nothing otherwise, and TensorRT lacks it
        features = channels_last(nn.functional.interpolate(pixel_values, size, mode="bilinear", antialias=shrinks))
        maps = []
        for k, stage in enumerate(self.stages):
            features = stage(features)
            if k:
                maps.append(self.outputs[k - 1](features))
        return maps


class AdapterPyramid(SimplePyramid):
    """The simple pyramid with a `ConvStem` added to its three finer maps: for objects near the size of a patch."""

    def __init__(self, dim: int, taps: int, channels: Sequence[int]) -> None:
        super().__init__(dim, taps, channels)
        self.stem = ConvStem(channels)

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """As `SimplePyramid.forward`; `pixel_values` (B, 3, H, W) are the normalised images."""
        *finer, coarsest = super().forward(maps, pixel_values)
        added = self.stem(pixel_values, finer[0].shape[-2:])
        return [*(one + other for one, other in zip(finer, added, strict=True)), coarsest]


class PlainNeck(nn.Module):
    """All four maps at the patch stride: the taps as they are, the last one repeated."""

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """Taps of (B, dim, h, w), at most four -> four maps of (B, dim, h, w)."""
        return [*maps, *[maps[-1]] * (4 - len(maps))]


class StagesNeck(nn.Module):
    """The four stages of a Swin or a ConvNeXt, unchanged."""

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """Four maps of strides 4, 8, 16 and 32 -> the same."""
        return list(maps)


def default_channels(dim: int) -> list[int]:
    """Channels of the pyramid's maps, fine to coarse: dim/4, dim/2, dim, dim, none over 256 (ViTDet's width)."""
    return [min(width, 256) for width in (dim // 4, dim // 2, dim, dim)]


class ScriptNeck(nn.Module):
    """The necks of DINOv3-Mask2former's checkpoints: each tap to its own number of channels, at the patch stride.

    With `resample`, the taps are first brought to strides p/4, p/2, p and 2p.
    """

    def __init__(self, dim: int, channels: Sequence[int], resample: bool) -> None:
        super().__init__()
        half, quarter = dim // 2, dim // 4
        inputs = [dim] * 4
        if resample:
            inputs = [quarter, half, dim, dim]
            upscale = [nn.ConvTranspose2d(dim, half, 2, 2), nn.GroupNorm(32, half), nn.GELU()]
            self.resamplers = nn.ModuleList(
                [
                    nn.Sequential(*upscale, nn.ConvTranspose2d(half, quarter, 2, 2)),
                    nn.ConvTranspose2d(dim, half, 2, 2),
                    nn.Identity(),
                    nn.MaxPool2d(2, 2),
                ]
            )
        else:
            self.resamplers = nn.ModuleList(nn.Identity() for _ in range(4))
        self.projections = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(inputs, channels, strict=True))

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """Four taps of (B, dim, h, w) -> four maps, fine to coarse."""
        steps = zip(self.projections, self.resamplers, maps, strict=True)
        return [project(resample(one)) for project, resample, one in steps]


SCRIPT_NECKS = {"script_plain": False, "script_pyramid": True}
"""Necks of converted checkpoints (see `original_script`) -> whether they resample."""
_PYRAMIDS = {"pyramid": SimplePyramid, "adapter": AdapterPyramid}


def build_neck(neck: str, backbone: PreTrainedConfig, channels: Sequence[int] | None) -> tuple[nn.Module, list[int]]:
    """Return the neck and the channels of its four maps, fine to coarse. Raises ModelError for an unknown neck."""
    maps = feature_maps(backbone)
    if is_pyramidal(backbone):
        return StagesNeck(), [one.channels for one in maps]
    dim, taps = maps[0].channels, len(maps)
    if neck == "plain":
        if taps > 4:
            raise ModelError(
                f"neck 'plain' takes at most 4 taps, got {taps}: shorten pyramid_taps or use neck 'pyramid'"
            )
        return PlainNeck(), [dim] * 4
    if neck in _PYRAMIDS:
        widths = list(channels or default_channels(dim))
        return _PYRAMIDS[neck](dim, taps, widths), widths
    if neck in SCRIPT_NECKS and channels and taps == 4:
        return ScriptNeck(dim, channels, SCRIPT_NECKS[neck]), list(channels)
    raise ModelError(f"neck must be 'pyramid', 'adapter' or 'plain', got {neck!r}")


class Encoder(nn.Module):
    """Backbone and neck. `channels` are those of the four maps, fine to coarse.

    A backbone without trainable weights runs in evaluation mode and without a graph.
    """

    def __init__(
        self, backbone: PreTrainedConfig, neck: str, neck_channels: Sequence[int] | None, last_norm: bool = True
    ) -> None:
        super().__init__()
        self.backbone = AutoBackbone.from_config(backbone)
        if self.backbone._supports_sdpa:
            self.backbone.set_attn_implementation(ATTENTION)
        if not last_norm:
            self.backbone.norm = nn.Identity()
        self.neck, self.channels = build_neck(neck, backbone, neck_channels)
        _deepen_drop_path(self.backbone)
        for name, parameter in self.backbone.named_parameters():
            if name.endswith("mask_token") or not parameter.numel():
                parameter.requires_grad_(False)  # used in pretraining only; and FSDP refuses empty parameters

    @property
    def frozen(self) -> bool:
        """True when no parameter of the backbone is trained."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode; a frozen backbone stays in evaluation mode (no drop path, no RoPE jitter).

        Batch norms stay in it too: their statistics are those of pretraining, as in the original (FrozenBN), because
        batches are small.
        """
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, maps: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> four maps, fine to coarse, (B, C_i, h_i, w_i).

        `maps`: the backbone's feature maps if already computed (see `backbone_features`).
        """
        four: list[Tensor] = self.neck(self.backbone_features(pixel_values) if maps is None else maps, pixel_values)
        return four

    def backbone_features(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """Normalised images (B, 3, H, W) -> the backbone's feature maps, (B, C, h, w) each."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps: Sequence[Tensor] = self.backbone(pixel_values).feature_maps
        return maps


def _deepen_drop_path(backbone: nn.Module) -> None:
    """Raise a ViT's drop path from 0 at its first layer to the configured rate at its last.

    Linear decay rule of stochastic depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382, section 3).
    transformers gives every ViT layer the same rate; its ConvNeXt already follows the rule.
    """
    drops: list[Any] = [module for name, module in backbone.named_modules() if name.endswith(".drop_path")]
    rates = [drop.drop_prob for drop in drops if not isinstance(drop, nn.Identity)]
    if len(rates) == len(drops) and len(set(rates)) == 1:
        for depth, drop in enumerate(drops):
            drop.drop_prob = rates[0] * depth / max(len(drops) - 1, 1)
