"""Necks: modules that make Mask2Former's four maps, of strides 4 to 32, from a backbone's features and the image."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

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
        finest = nn.Sequential(
            nn.ConvTranspose2d(dim, half, 2, 2),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
            *_projection(quarter, channels[0]),
        )
        self.scales = nn.ModuleList([finest, *_coarser_scales(dim, channels)])

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """Taps of (B, dim, h, w) -> [(B, C0, 4h, 4w), (B, C1, 2h, 2w), (B, C2, h, w), (B, C3, h/2, w/2)]."""
        fused = self.fuse(channels_last(torch.cat(tuple(maps), dim=1)))
        return [scale(fused) for scale in self.scales]


def _coarser_scales(dim: int, channels: Sequence[int]) -> list[nn.Module]:
    """Layers that make the pyramid's three coarser maps from (B, dim, h, w): (B, C1, 2h, 2w) to (B, C3, h/2, w/2)."""
    return [
        nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, 2, 2), *_projection(dim // 2, channels[1])),
        nn.Sequential(*_projection(dim, channels[2])),
        nn.Sequential(nn.MaxPool2d(2, 2), *_projection(dim, channels[3])),
    ]


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

    plain_start: the first stage, which has the largest map, is a convolution and a ReLU, at half of its cost.
    """

    widths = (32, 64, 96, 128)

    def __init__(self, channels: Sequence[int], plain_start: bool = False) -> None:
        super().__init__()
        inputs = (3, *self.widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), ChannelNorm(o), nn.GELU())
            for i, o in zip(inputs, self.widths, strict=True)
        )
        if plain_start:
            first = nn.Conv2d(3, self.widths[0], 3, stride=2, padding=1)
            self.stages[0] = nn.Sequential(first, nn.ReLU(inplace=True))
        self.outputs = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(self.widths[1:], channels[:3], strict=True))

    def forward(self, pixel_values: Tensor, finest: torch.Size) -> list[Tensor]:
        """Images (B, 3, H, W) and the finest map's (4h, 4w) -> [(B, C0, 4h, 4w), (B, C1, 2h, 2w), (B, C2, h, w)].

        The image is first resized to four times the finest map: its own size when the patch size is 16.
        """
        size = [4 * side for side in finest]
        shrinks = size[0] < pixel_values.shape[-2]  # antialias changes nothing otherwise, and TensorRT lacks it
        features = channels_last(F.interpolate(pixel_values, size, mode="bilinear", antialias=shrinks))
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


class ConvBlock(nn.Module):
    """x + convolution(GELU(norm(convolution(x)))) with 3x3 convolutions: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelNorm(channels)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Add to the features what the convolutions make of them."""
        update: Tensor = self.outer(F.gelu(self.norm(self.inner(features))))
        return features + update


class TopDown(nn.Module):
    """Add to each map the next coarser one, enlarged, then apply a `ConvBlock`; from coarse to fine.

    The top-down pathway of feature pyramid networks (Lin et al. 2017, https://arxiv.org/abs/1612.03144, section 3). It
    replaces the pixel decoder's deformable attention in light heads: a layer of that takes a fifth to a quarter of
    their training step on a CPU (benchmarks/accuracy/TABLES.md). A ViT's features already cover the whole image.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(one) for one in channels)
        self.widths = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairwise(channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, h_i, w_i), fine to coarse -> the same shapes."""
        done = [self.blocks[-1](maps[-1])]
        for block, width, feature in reversed(list(zip(self.blocks, self.widths, maps, strict=False))):
            coarser = F.interpolate(width(done[0]), size=feature.shape[-2:], mode="bilinear")
            done.insert(0, block(feature + coarser))
        return done


class TopDownPyramid(nn.Module):
    """A ViT's taps -> maps of strides p/4 to 2p, the finest from the image alone, the others joined by `TopDown`.

    The adapter's layers, except that its first stage is plain and its finest map isn't made from the taps: the pixel
    decoder adds the next coarser map to it anyway.
    """

    def __init__(self, dim: int, taps: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(dim * taps, dim, 1) if taps > 1 else nn.Identity()
        self.scales = nn.ModuleList(_coarser_scales(dim, channels))
        self.stem = ConvStem(channels, plain_start=True)
        self.top_down = TopDown(channels[1:])

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """As `AdapterPyramid.forward`."""
        fused = self.fuse(channels_last(torch.cat(tuple(maps), dim=1)))
        fine, middle, coarse = (scale(fused) for scale in self.scales)
        finest, *added = self.stem(pixel_values, torch.Size([2 * side for side in fine.shape[-2:]]))
        return [finest, *self.top_down([fine + added[0], middle + added[1], coarse])]


class TopDownStages(nn.Module):
    """The four stages of a Swin or a ConvNeXt in the given widths, the three coarser ones joined by `TopDown`."""

    def __init__(self, stages: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.widths = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 1, bias=False), ChannelNorm(o)) for i, o in zip(stages, channels, strict=True)
        )
        self.top_down = TopDown(channels[1:])

    def forward(self, maps: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """Four maps of strides 4, 8, 16 and 32 -> maps of these strides, (B, C_i, h_i, w_i)."""
        finest, *coarser = (width(channels_last(one)) for width, one in zip(self.widths, maps, strict=True))
        return [finest, *self.top_down(coarser)]


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
_PYRAMIDS = {"pyramid": SimplePyramid, "adapter": AdapterPyramid, "top_down": TopDownPyramid}


def smallest_side(neck: str, stride: int, is_vit: bool) -> int:
    """The smallest side of an image: of a ViT two patches, because these necks halve its maps; else the stride."""
    return 2 * stride if is_vit and (neck in _PYRAMIDS or SCRIPT_NECKS.get(neck)) else stride


def build_neck(neck: str, backbone: PreTrainedConfig, channels: Sequence[int] | None) -> tuple[nn.Module, list[int]]:
    """Return the neck and the channels of its four maps, fine to coarse. Raises ModelError for an unknown neck."""
    maps = feature_maps(backbone)
    if is_pyramidal(backbone):
        stages = [one.channels for one in maps]
        if neck != "top_down":
            return StagesNeck(), stages
        widths = list(channels or (min(width, 256) for width in stages))
        return TopDownStages(stages, widths), widths
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
    raise ModelError(f"neck must be 'pyramid', 'adapter', 'top_down' or 'plain', got {neck!r}")
