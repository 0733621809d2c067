"""Random points, and bilinear values of maps at points: what the losses compute instead of whole masks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def random_points(count: int, each: int, like: Tensor) -> Tensor:
    """Independent uniform points in [0, 1], (count, each, 2), of a tensor's type and device."""
    return torch.rand(count, each, 2, device=like.device, dtype=like.dtype)


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of each image's maps (B, C, h, w) at its points (B, P, 2) in [0, 1] -> (B, C, P).

    As `F.grid_sample(align_corners=False, padding_mode="zeros")`.
    """
    if features.device.type == "cpu":
        sampled: Tensor = _RowsAtPoints.apply(features, points)  # type: ignore[no-untyped-call]
        return sampled.transpose(1, 2)
    return F.grid_sample(features, 2 * points.unsqueeze(2) - 1, align_corners=False).squeeze(3)


def sample_logits(logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of each map (M, h, w) at its own points (M, P, 2) in [0, 1] -> (M, P)."""
    return F.grid_sample(logits.unsqueeze(1), 2 * points.unsqueeze(2) - 1, align_corners=False)[:, 0, :, 0]


class _RowsAtPoints(torch.autograd.Function):
    """`sample_features` on a CPU, where the backward pass of grid_sample takes up to five times as long.

    Maps stored channels-last are a table with a row of C values for each cell. A point is the weighted sum of four
    rows, and its gradient is added to these rows.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, points: Tensor) -> Tensor:
        """Maps (B, C, h, w) and points (B, P, 2) -> (B, P, C)."""
        rows, weights = four_cells(points.to(features.dtype), features.shape[-2], features.shape[-1])
        table = features.permute(0, 2, 3, 1).flatten(0, 2).contiguous()  # (B h w, C)
        ctx.save_for_backward(rows, weights)
        ctx.shape = features.shape
        sampled = F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
        return sampled.view(*points.shape[:2], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradient of the maps (B, C, h, w), stored channels-last."""
        rows, weights = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        of_points = gradient.reshape(-1, channels)
        table = of_points.new_zeros(batch * height * width, channels)
        for row, weight in zip(rows.unbind(1), weights.unbind(1), strict=True):
            table.index_add_(0, row, of_points * weight.unsqueeze(1))
        return table.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def four_cells(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four cells around each point (B, P, 2): rows of a table of B x height x width cells, and bilinear weights.

    Both (B P, 4). Cells outside the map have the weight 0.
    """
    places = points * points.new_tensor([width, height]) - 0.5
    first = places.floor()
    share = places - first
    starts = torch.arange(len(points)).unsqueeze(1) * (height * width)  # (B, 1)
    rows, weights = [], []
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = first[..., 0] + right, first[..., 1] + down
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        rows.append(starts + (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).long())
        along_x, along_y = (
            part if far else 1 - part for part, far in zip(share.unbind(-1), (right, down), strict=True)
        )
        weights.append(along_x * along_y * inside)
    return torch.stack(rows, -1).flatten(0, 1), torch.stack(weights, -1).flatten(0, 1)
