"""Deformable attention on CUDA in Triton: samples are read, weighted and summed in registers and never stored.

Off unless M2F_TRITON=1 is set: it has not been measured on a GPU yet; its results are tested with Triton's interpreter
on a CPU. A program handles a block of queries of one head and one level. A query's channels are contiguous, so each
corner of a sample is one coalesced read. The values' gradient uses atomic additions, whose order varies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:  # absent without a GPU build of torch; imported only when M2F_TRITON=1
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("M2F_TRITON=1 needs the package triton, which comes with torch for CUDA") from missing

QUERIES_AT_ONCE = 32
Shapes = Sequence[tuple[int, int]]


@triton.jit
def _corner(table, x, y, height, width, stride, channels, wide):  # type: ignore[no-untyped-def]
    """Rows of a level's map at whole pixels x, y (q,), zeros outside it -> (q, D); and where it lies inside."""
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    at = tl.where(inside, y * width + x, 0).to(tl.int64) * stride
    keep = inside[:, None] & wide[None, :]
    return tl.load(table + at[:, None] + channels[None, :], mask=keep, other=0.0), at, keep


@triton.jit
def _place(places, at, live, height, width):  # type: ignore[no-untyped-def]
    """Whole pixels and fractions of places; points without a corner inside, and NaNs, are moved outside."""
    x = tl.load(places + 2 * at, mask=live, other=-2.0)
    y = tl.load(places + 2 * at + 1, mask=live, other=-2.0)
    near = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = tl.where(near, x, -2.0), tl.where(near, y, -2.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit  # type: ignore[untyped-decorator]
def _forward_level(  # type: ignore[no-untyped-def]
    value, places, weights, output, length, heads, levels, level, start, height, width,
    points: tl.constexpr, dim: tl.constexpr, breadth: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Add one level's weighted samples to the output, for block queries of one head of one image."""
    query, head = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(1) % heads
    image = (tl.program_id(1) // heads).to(tl.int64)
    live, channels = query < length, tl.arange(0, breadth)
    wide, stride = channels < dim, heads * dim
    row = (image * length + query) * heads + head
    table = value + ((image * length + start) * heads + head) * dim
    into, keep = output + row[:, None] * dim + channels[None, :], live[:, None] & wide[None, :]
    total = tl.load(into, mask=keep, other=0.0)
    for point in range(points):
        at = (row * levels + level) * points + point
        left, top, x, y = _place(places, at, live, height, width)
        a, _, _ = _corner(table, left, top, height, width, stride, channels, wide)
        b, _, _ = _corner(table, left + 1, top, height, width, stride, channels, wide)
        c, _, _ = _corner(table, left, top + 1, height, width, stride, channels, wide)
        d, _, _ = _corner(table, left + 1, top + 1, height, width, stride, channels, wide)
        weight = tl.load(weights + at, mask=live, other=0.0)
        upper, lower = a + x[:, None] * (b - a), c + x[:, None] * (d - c)
        total += weight[:, None] * (upper + y[:, None] * (lower - upper))
    tl.store(into, total, mask=keep)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_level(  # type: ignore[no-untyped-def]
    value, places, weights, grad, grad_value, grad_places, grad_weights, length, heads, levels, level, start, height,
    width, points: tl.constexpr, dim: tl.constexpr, breadth: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Gradients of one level's places and weights, and its share of the values', for block queries of one head."""
    query, head = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(1) % heads
    image = (tl.program_id(1) // heads).to(tl.int64)
    live, channels = query < length, tl.arange(0, breadth)
    wide, stride = channels < dim, heads * dim
    row = (image * length + query) * heads + head
    base = ((image * length + start) * heads + head) * dim
    table, spread = value + base, grad_value + base + channels[None, :]
    keep = live[:, None] & wide[None, :]
    vector = tl.load(grad + row[:, None] * dim + channels[None, :], mask=keep, other=0.0)
    for point in range(points):
        at = (row * levels + level) * points + point
        left, top, x, y = _place(places, at, live, height, width)
        a, at_a, in_a = _corner(table, left, top, height, width, stride, channels, wide)
        b, at_b, in_b = _corner(table, left + 1, top, height, width, stride, channels, wide)
        c, at_c, in_c = _corner(table, left, top + 1, height, width, stride, channels, wide)
        d, at_d, in_d = _corner(table, left + 1, top + 1, height, width, stride, channels, wide)
        weight = tl.load(weights + at, mask=live, other=0.0)
        dot_a, dot_b = tl.sum(a * vector, 1), tl.sum(b * vector, 1)
        dot_c, dot_d = tl.sum(c * vector, 1), tl.sum(d * vector, 1)
        upper, lower = dot_a + x * (dot_b - dot_a), dot_c + x * (dot_d - dot_c)
        along_x = (dot_b - dot_a) + y * ((dot_d - dot_c) - (dot_b - dot_a))
        tl.store(grad_weights + at, upper + y * (lower - upper), mask=live)
        tl.store(grad_places + 2 * at, weight * along_x, mask=live)
        tl.store(grad_places + 2 * at + 1, weight * (lower - upper), mask=live)
        right, below = weight * x, weight * y
        corner = right * y
        tl.atomic_add(spread + at_a[:, None], (weight - right - below + corner)[:, None] * vector, mask=in_a & keep)
        tl.atomic_add(spread + at_b[:, None], (right - corner)[:, None] * vector, mask=in_b & keep)
        tl.atomic_add(spread + at_c[:, None], (below - corner)[:, None] * vector, mask=in_c & keep)
        tl.atomic_add(spread + at_d[:, None], corner[:, None] * vector, mask=in_d & keep)


class TritonSampling(torch.autograd.Function):
    """The weighted sum of samples as one differentiable step that keeps only its inputs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        """Value (B, S, H, D), places (B, S, H, L, P, 2) in pixels, weights (B, S, H, L, P) -> (B, S, H x D)."""
        value, places, weights = (tensor.contiguous() for tensor in (value, places, weights))
        ctx.save_for_backward(value, places, weights)
        ctx.shapes = shapes
        output = torch.zeros_like(value)
        _each_level(_forward_level, (value, places, weights, output), value, places, shapes)
        return output.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of value, places and weights, in their shapes."""
        value, places, weights = ctx.saved_tensors
        grads = torch.zeros_like(value), torch.empty_like(places), torch.empty_like(weights)
        given = (value, places, weights, grad_output.contiguous(), *grads)
        _each_level(_backward_level, given, value, places, ctx.shapes)
        return *grads, None


def _each_level(kernel: Any, tensors: Sequence[Tensor], value: Tensor, places: Tensor, shapes: Shapes) -> None:
    """Launch a kernel once a level, over blocks of queries and the heads of all images."""
    batch, length, heads, dim = value.shape
    levels, points = places.shape[3:5]
    constants = {"points": points, "dim": dim, "breadth": triton.next_power_of_2(dim), "block": QUERIES_AT_ONCE}
    start = 0
    for level, (height, width) in enumerate(shapes):
        sizes = (length, heads, levels, level, start, height, width)
        kernel[(triton.cdiv(length, QUERIES_AT_ONCE), batch * heads)](*tensors, *sizes, **constants)
        start += height * width
