"""Deformable attention by gathered rows instead of `grid_sample`: for runtimes without ONNX's GridSample.

The same numbers as `attend_grid` to float32's rounding, with operators that every runtime has (Pad, Floor, Gather,
MatMul). It is used in exports only.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def attend_gather(value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Value (B, S, H, D), places (B, S, H, L, P, 2) in pixels, weights (B, S, H, L, P) -> (B, S, H x D)."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32)).permute(0, 2, 3, 1).flatten(0, 1)  # (B x H, D, S)
    parts = wide.split([height * width for height, width in shapes], dim=2)
    total = torch.zeros((), dtype=wide.dtype, device=value.device)
    for level, (part, (height, width)) in enumerate(zip(parts, shapes, strict=True)):
        x, y = places[:, :, :, level].transpose(1, 2).flatten(0, 1).unbind(-1)  # (B x H, S, P) each
        plane = part.unflatten(2, (height, width))
        corners, shares = _corners(x, y, height, width)  # (B x H, S, P, 4) each
        shares = shares * weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(-1)
        rows = _gather(plane, corners.flatten(2))  # (B x H, S, P x 4, D)
        total = total + (shares.flatten(2).unsqueeze(2) @ rows).squeeze(2)  # (B x H, S, D)
    output: Tensor = total.unflatten(0, (value.shape[0], -1)).transpose(1, 2).flatten(2).to(value.dtype)
    return output


def _corners(x: Tensor, y: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each place, as positions in the plane with a border of zeros, and their bilinear weights.

    Places (..., P) -> twice (..., P, 4). Places outside are moved to the centre of the border, where all is zero.
    """
    x, y = x.clamp(-1, width), y.clamp(-1, height)
    left, top = x.floor().clamp(max=width - 1), y.floor().clamp(max=height - 1)
    right_share, bottom_share = x - left, y - top
    stride = width + 2
    first = (top.long() + 1) * stride + left.long() + 1
    positions = torch.stack([first, first + 1, first + stride, first + stride + 1], dim=-1)
    left_share, top_share = 1 - right_share, 1 - bottom_share
    shares = [left_share * top_share, right_share * top_share, left_share * bottom_share, right_share * bottom_share]
    return positions, torch.stack(shares, dim=-1)


def _gather(plane: Tensor, positions: Tensor) -> Tensor:
    """Rows of (N, D, h, w) with a border of zeros at the positions (N, S, R) -> (N, S, R, D)."""
    rows = F.pad(plane, (1, 1, 1, 1)).flatten(2).transpose(1, 2)  # (N, (h + 2) (w + 2), D)
    count, length, channels = rows.shape
    starts = torch.arange(count, device=plane.device) * length
    return F.embedding(positions + starts.view(-1, 1, 1), rows.reshape(-1, channels))
