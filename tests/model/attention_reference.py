"""Deformable attention beside transformers' own: values and gradients in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

SHAPES = ((3, 5), (6, 4), (1, 1))
LENGTH = 40
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Value, places in pixels, weights -> output."""


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """value (2, 40, 2, 4), locations from -1 to 2, far outside the maps, and weights."""
    torch.manual_seed(0)
    value = torch.randn(2, LENGTH, 2, 4, dtype=torch.float64)
    locations = torch.rand(2, LENGTH, 2, 3, 2, 2, dtype=torch.float64) * 3 - 1
    weights = torch.rand(2, LENGTH, 2, 3, 2, dtype=torch.float64)
    return value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()


def in_pixels(locations: Tensor) -> Tensor:
    """Locations in [0, 1] -> pixels of each level, 0 being the first pixel's centre."""
    sizes = locations.new_tensor([[width, height] for height, width in SHAPES])
    return locations * sizes.unsqueeze(1) - 0.5


def assert_equal_to_transformers(attention: Attention) -> None:
    """Outputs and the gradients of all three inputs, to 1e-11."""
    value, locations, weights = inputs()
    expected = multi_scale_deformable_attention(value, SHAPES, locations, weights)
    found = attention(value, in_pixels(locations), weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, (value, locations, weights), gradient),
        torch.autograd.grad(expected, (value, locations, weights), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def assert_nan_reads_nothing(attention: Attention) -> None:
    """A location that is not a number gives zeros, not NaN and no read outside the map."""
    value, locations, weights = inputs()
    assert attention(value, torch.full_like(locations, torch.nan), weights).eq(0).all()


def attention_of(forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]]) -> Attention:
    """A differentiable function of one implementation's forward and backward."""

    class Attended(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return forward(*tensors, SHAPES)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
            return backward(*ctx.saved_tensors, *grad_outputs, SHAPES)

    return Attended.apply  # type: ignore[no-any-return]
