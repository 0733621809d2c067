"""Deformable attention by torch's `grid_sample`: for any device, and the reference for the others.

Its operators are torch's own, so autograd differentiates `attend_grid` and exporters take it. `attend_grid_backward`
recomputes the samples of one level at a time, so that they need not be kept.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BILINEAR, ZEROS, ALIGN_CORNERS = 0, 0, False
"""`grid_sample`'s defaults, as its backward operator takes them."""

Shapes = Sequence[tuple[int, int]]


def attend_grid(value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Value (B, S, H, D), places (B, S, H, L, P, 2) in pixels, weights (B, S, H, L, P) -> (B, S, H x D)."""
    planes, flat_weights = _planes(value, shapes), _by_head(weights)
    total = torch.zeros((), dtype=planes[0].dtype, device=value.device)
    for level, plane in enumerate(planes):
        samples = F.grid_sample(plane, _grid(places, level, shapes[level]), align_corners=ALIGN_CORNERS)
        total = total + (samples * flat_weights[:, None, :, level]).sum(-1)  # (B x H, D, S)
    output: Tensor = total.unflatten(0, (value.shape[0], -1)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)
    return output


def attend_grid_backward(
    value: Tensor, places: Tensor, weights: Tensor, grad_output: Tensor, shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, places and weights, in their shapes and types, given that of the output, (B, S, H x D)."""
    planes, flat_weights = _planes(value, shapes), _by_head(weights)
    gradient = grad_output.to(planes[0].dtype).view_as(value).permute(0, 2, 3, 1).flatten(0, 1)  # (B x H, D, S)
    grad_planes = []
    grad_places, grad_weights = torch.empty_like(places), torch.empty_like(weights)
    for level, (plane, shape) in enumerate(zip(planes, shapes, strict=True)):
        grid = _grid(places, level, shape)
        samples = F.grid_sample(plane, grid, align_corners=ALIGN_CORNERS)  # (B x H, D, S, P)
        grad_samples = gradient.unsqueeze(-1) * flat_weights[:, None, :, level]
        grad_plane, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad_samples, plane, grid, BILINEAR, ZEROS, ALIGN_CORNERS, [True, True]
        )
        grad_planes.append(grad_plane.flatten(2))
        heads = (value.shape[0], -1)
        grad_weights[:, :, :, level] = (samples * gradient.unsqueeze(-1)).sum(1).unflatten(0, heads).transpose(1, 2)
        grad_places[:, :, :, level] = (grad_grid.unflatten(0, heads) * (2 / _sides(shape, grid))).transpose(1, 2)
    grad_value = torch.cat(grad_planes, dim=2).unflatten(0, (value.shape[0], -1)).permute(0, 3, 1, 2)
    return grad_value.to(value.dtype).contiguous(), grad_places, grad_weights


def _planes(value: Tensor, shapes: Shapes) -> list[Tensor]:
    """(B, S, H, D) -> one (B x H, D, h, w) a level, in float32 at least."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32)).permute(0, 2, 3, 1).flatten(0, 1)
    parts = wide.split([height * width for height, width in shapes], dim=2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def _by_head(weights: Tensor) -> Tensor:
    """(B, S, H, L, P) -> (B x H, S, L, P)."""
    return weights.transpose(1, 2).flatten(0, 1)


def _grid(places: Tensor, level: int, shape: tuple[int, int]) -> Tensor:
    """Places of one level as `grid_sample` takes them: (B x H, S, P, 2) from -1 to 1, the outer edges of the map."""
    return (2 * places[:, :, :, level] + 1).div(_sides(shape, places)).sub(1).transpose(1, 2).flatten(0, 1)


def _sides(shape: tuple[int, int], like: Tensor) -> Tensor:
    """(2,): width and height. Created on the device, to avoid a copy from the host in each layer."""
    return torch.stack([like.new_full((), side) for side in shape[::-1]])
