"""The architecture of DINOv3's ViT and ConvNeXt with Meta's tensor names, and timm, to compare conversions with.

Written from the papers (https://arxiv.org/abs/2508.10104, https://arxiv.org/abs/2201.03545) and the names in
facebookresearch/dinov3 `models/vision_transformer.py` and `models/convnext.py`.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import math
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomize(module: nn.Module, seed: int = 0) -> Any:
    """The module in evaluation mode, with all parameters random, none of them near zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / math.sqrt(max(parameter.shape[-1:], default=1))
            )
    return module.eval()


def rope(h: int, w: int, periods: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine (h w, head size) at the centres of h x w patches, both axes scaled to [-1, 1]."""
    y, x = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (h, w))
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
    angles = (2 * math.pi * centres[:, :, None] / periods).flatten(1).repeat(1, 2)
    return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of the last axis; the first tokens, which have no place, stay."""
    first, patches = x.split([x.shape[-2] - len(sin), len(sin)], -2)
    one, two = patches.chunk(2, -1)
    return torch.cat([first, patches * cos + torch.cat([-two, one], -1) * sin], -2)


class KeyMasked(nn.Linear):
    """The projection to queries, keys and values; the bias of the keys is masked out."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)
        self.register_buffer("bias_mask", torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool, masked: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = KeyMasked(width) if masked else nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = rotate(q, sin, cos), rotate(k, sin, cos)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, gated: bool, qkv_bias: bool, masked: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(width, heads, qkv_bias, masked)
        self.mlp = SwiGlu(width, inner) if gated else Mlp(width, inner)
        self.ls1, self.ls2 = Scale(width), Scale(width)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + self.ls1.gamma * self.attn(self.norm1(x), sin, cos)
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class MetaViT(nn.Module):
    """DINOv3's ViT. With `local_norm` it has the unused norm of the 7B and satellite models."""

    def __init__(
        self, width: int = 128, depth: int = 4, heads: int = 2, inner: int = 96, *, gated: bool = False,
        qkv_bias: bool = True, masked: bool = True, registers: int = 4, patch: int = 8, local_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.storage_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        quarter = width // heads // 4
        self.rope_embed = nn.Module()
        self.rope_embed.register_buffer("periods", 100 ** (torch.arange(quarter) / quarter))
        self.blocks = nn.ModuleList(Block(width, heads, inner, gated, qkv_bias, masked) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        if local_norm:
            self.local_cls_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """Images (B, 3, H, W) -> the normalised patch tokens after each of `layers`, from 1, as (B, C, h, w)."""
        patches = self.patch_embed["proj"](images)
        h, w = patches.shape[-2:]
        sin, cos = rope(h, w, self.rope_embed.periods)
        first = torch.cat([self.cls_token, self.storage_tokens], 1).expand(len(images), -1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)
        maps = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x, sin, cos)
            if number in layers:
                maps.append(self.norm(x)[:, first.shape[1] :].transpose(1, 2).unflatten(2, (h, w)))
        return maps


class ChannelNorm(nn.LayerNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x).movedim(1, -1)))))
        return x + (self.gamma * inner).movedim(-1, 1)


class MetaConvNeXt(nn.Module):
    """DINOv3's ConvNeXt. Its last norm is stored twice, as Meta does."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24, 32), depths: tuple[int, ...] = (1, 2, 3, 1)) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0]))
        later = [nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, 2)) for a, b in itertools.pairwise(widths)]
        self.downsample_layers = nn.ModuleList([stem, *later])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.norms = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), self.norm])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> the four stages' outputs."""
        maps = [images]
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            maps.append(stage(down(maps[-1])))
        return maps[1:]


TIMM_NAMES = (
    (r"mask_token|rope_embed\..*|.*bias_mask|local_cls_norm\..*|norms\..*", None),
    (r"storage_tokens", "reg_token"),
    (r"(.*)ls([12])\.gamma", r"\1gamma_\2"),
    (r"(.*mlp\.)w1(.*)", r"\1fc1_g\2"),
    (r"(.*mlp\.)w2(.*)", r"\1fc1_x\2"),
    (r"(.*mlp\.)w3(.*)", r"\1fc2\2"),
    (r"downsample_layers\.0\.(.*)", r"stem.\1"),
    (r"downsample_layers\.(\d)\.(.*)", r"stages.\1.downsample.\2"),
    (r"(stages\.\d)\.(\d)\.dwconv(.*)", r"\1.blocks.\2.conv_dw\3"),
    (r"(stages\.\d)\.(\d)\.pwconv(.*)", r"\1.blocks.\2.mlp.fc\3"),
    (r"(stages\.\d)\.(\d)\.(.*)", r"\1.blocks.\2.\3"),
)


def timm_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's tensors under timm's names, as its `checkpoint_filter_fn` makes them; a test compares with timm itself."""
    convnext = "downsample_layers.0.0.weight" in state
    found = {}
    for name, tensor in state.items():
        match, new = next(((m, new) for old, new in TIMM_NAMES if (m := re.fullmatch(old, name))), (None, name))
        if name.endswith("qkv.bias"):
            found[name.replace("qkv.bias", "q_bias")], _, found[name.replace("qkv.bias", "v_bias")] = tensor.chunk(3)
        elif new is not None:
            found[match.expand(new) if match else f"head.{name}" if convnext else name] = tensor.contiguous()
    return found


class Placeholder(type):
    """A class whose attributes are such classes."""

    def __getattr__(cls, name: str) -> "Placeholder":
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(name, (), {})


class PlaceholderModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of torchvision, full of placeholders."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        is_wanted = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_wanted else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = lambda name: getattr(Placeholder("module", (), {}), name)


def import_timm() -> Any:
    """timm without torchvision, which breaks transformers where torch is of another build; skips if it is absent."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm isn't installed: pip install --no-deps timm")
    finder = PlaceholderModules()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
