"""Multi-scale deformable attention (Zhu et al. 2021, https://arxiv.org/abs/2010.04159, eq. 3) with low memory.

transformers' version keeps every sampled value for the backward pass. Here samples are recomputed in backward, so that
only the inputs are kept, and levels are sampled one after another. A CPU samples whole rows
instead of single channels (deformable_cpu.py). On CUDA, M2F_TRITON=1 in the environment selects our own kernels instead
of torch's `grid_sample` (deformable_triton.py); they are off by default until a GPU has measured them.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .deformable_cpu import RowSampling

BILINEAR, ZEROS, ALIGN_CORNERS = 0, 0, False


class DeformableSampling(torch.autograd.Function):
    """The weighted sum of samples as one differentiable step; samples exist for one level at a time."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Value (N, D, S), grid (N, S, L, P, 2) in [-1, 1], weights (N, S, L, P) -> (N, D, S); N = batch x heads."""
        ctx.save_for_backward(value, grid, weights)
        ctx.shapes = shapes
        output = torch.zeros_like(value)
        for level, plane in enumerate(_planes(value, shapes)):
            samples = F.grid_sample(
                plane, grid[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False
            )
            output += torch.einsum("ndsp,nsp->nds", samples, weights[:, :, level])
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Recompute the samples; return the gradients of value, grid and weights, in their shapes."""
        value, grid, weights = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_grid, grad_weights = torch.empty_like(grid), torch.empty_like(weights)
        grad_planes = []
        for level, plane in enumerate(_planes(value, ctx.shapes)):
            points = grid[:, :, level].contiguous()
            samples = F.grid_sample(plane, points, mode="bilinear", padding_mode="zeros", align_corners=False)
            grad_weights[:, :, level] = torch.einsum("ndsp,nds->nsp", samples, grad_output)
            grad_samples = grad_output.unsqueeze(-1) * weights[:, :, level].unsqueeze(1)
            grad_plane, grad_points = torch.ops.aten.grid_sampler_2d_backward(
                grad_samples, plane, points, BILINEAR, ZEROS, ALIGN_CORNERS, [True, True]
            )
            grad_planes.append(grad_plane.flatten(2))
            grad_grid[:, :, level] = grad_points
        return torch.cat(grad_planes, dim=2), grad_grid, grad_weights, None


def _planes(value: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(N, D, S) -> one (N, D, h, w) a level."""
    parts = value.split([height * width for height, width in shapes], dim=2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


class SmallSoftmax(torch.autograd.Function):
    """Softmax over the last dimension, computed on whole arrays; only its output is kept for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        """exp(x - max x) / sum, in the shape of `logits`."""
        output = (logits - logits.amax(-1, keepdim=True)).exp_()
        output.div_(output.sum(-1, keepdim=True))
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """p (g - sum of p g), in the shape of `logits`."""
        (output,) = ctx.saved_tensors
        gradient = grad_outputs[0] * output
        return torch.addcmul(gradient, output, gradient.sum(-1, keepdim=True), value=-1)


def small_softmax(logits: Tensor) -> Tensor:
    """Softmax over a short last dimension, for which torch's own is 9 times slower on a CPU."""
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        output: Tensor = SmallSoftmax.apply(logits)  # type: ignore[no-untyped-call]
        return output
    return logits.softmax(-1)


def deformable_attention(value: Tensor, shapes: Sequence[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """Return the attended values (B, S, heads x D).

    value (B, S, heads, D); places (B, S, heads, L, P, 2) as (x, y) in pixels of each level, 0 being the first one's
    centre; weights (B, S, heads, L, P), summing to 1 over L x P. S runs over all positions of all levels, in the order
    of `shapes`.
    """
    output: Tensor
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        output = RowSampling.apply(value, places, weights, shapes)  # type: ignore[no-untyped-call]
        return output
    if value.is_cuda and os.environ.get("M2F_TRITON") == "1" and not torch.compiler.is_compiling():
        from .deformable_triton import TritonSampling

        output = TritonSampling.apply(value, places, weights, shapes)  # type: ignore[no-untyped-call]
        return output
    batch, length, heads, dim = value.shape
    flat_value = value.permute(0, 2, 3, 1).reshape(batch * heads, dim, length)
    sizes = torch.stack([torch.stack([value.new_full((), side) for side in shape[::-1]]) for shape in shapes])
    grid = ((2 * places + 1) / sizes.unsqueeze(1) - 1).transpose(1, 2).flatten(0, 1)  # (B x heads, S, L, P, 2)
    flat_weights = weights.transpose(1, 2).flatten(0, 1)  # (B x heads, S, L, P)
    output = DeformableSampling.apply(flat_value, grid, flat_weights, shapes)  # type: ignore[no-untyped-call]
    return output.view(batch, heads, dim, length).permute(0, 3, 1, 2).reshape(batch, length, heads * dim)
