"""Deformable attention on CUDA in Triton: samples are read, weighted and summed in registers and never stored.

A program handles a block of queries of one head, over all levels. A query's channels are contiguous, so each corner of
a sample is one coalesced read. Sums are in the type of the weights, also where the values
are half-precision. The values' gradient uses atomic
additions, whose order varies: its last digits differ from run to run, as with torch's own `grid_sample` on CUDA.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:  # absent without a GPU build of torch
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the package triton, which comes with torch for CUDA, isn't installed") from missing

QUERIES_AT_ONCE = 32
Shapes = Sequence[tuple[int, int]]


@triton.jit  # type: ignore[untyped-decorator]
def _corner(table, x, y, height, width, stride, channels, wide, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a level's map at whole pixels x, y (q,), zeros outside it -> (q, D), their offsets, and where inside."""
    keep = ((x >= 0) & (x < width) & (y >= 0) & (y < height))[:, None] & wide[None, :]
    column = tl.minimum(tl.maximum(x, 0), width - 1)
    line = tl.minimum(tl.maximum(y, 0), height - 1)
    at = (line * width + column) * stride
    return tl.load(table + at[:, None] + channels[None, :], mask=keep, other=0.0).to(kind), at, keep


@triton.jit
def _place(places, at, live, height, width):  # type: ignore[no-untyped-def]
    """Whole pixels and fractions of places; points without a corner inside, and NaNs, are moved outside."""
    x = tl.load(places + 2 * at, mask=live, other=-2.0)
    y = tl.load(places + 2 * at + 1, mask=live, other=-2.0)
    near = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = tl.where(near, x, -2.0), tl.where(near, y, -2.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), (x - left)[:, None], (y - top)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    value, places, weights, output, sizes, length,
    heads: tl.constexpr, levels: tl.constexpr, points: tl.constexpr, dim: tl.constexpr, breadth: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Weighted sums of samples for a block of queries of one head of one image."""
    query, head = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(1) % heads
    image = (tl.program_id(1) // heads).to(tl.int64)
    live, channels = query < length, tl.arange(0, breadth)
    wide = channels < dim
    row = (image * length + query) * heads + head
    kind: tl.constexpr = weights.dtype.element_ty
    total = tl.zeros([block, breadth], kind)
    for level in range(levels):
        height, width = tl.load(sizes + 3 * level), tl.load(sizes + 3 * level + 1)
        table = value + ((image * length + tl.load(sizes + 3 * level + 2)) * heads + head) * dim
        for point in range(points):
            at = (row * levels + level) * points + point
            left, top, x, y = _place(places, at, live, height, width)
            a, _, _ = _corner(table, left, top, height, width, heads * dim, channels, wide, kind)
            b, _, _ = _corner(table, left + 1, top, height, width, heads * dim, channels, wide, kind)
            c, _, _ = _corner(table, left, top + 1, height, width, heads * dim, channels, wide, kind)
            d, _, _ = _corner(table, left + 1, top + 1, height, width, heads * dim, channels, wide, kind)
            weight = tl.load(weights + at, mask=live, other=0.0)
            upper, lower = a + x * (b - a), c + x * (d - c)
            total += weight[:, None] * (upper + y * (lower - upper))
    into = output + row[:, None] * dim + channels[None, :]
    tl.store(into, total.to(output.dtype.element_ty), mask=live[:, None] & wide[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    value, places, weights, grad, grad_value, grad_places, grad_weights, sizes, length,
    heads: tl.constexpr, levels: tl.constexpr, points: tl.constexpr, dim: tl.constexpr, breadth: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Gradients of places and weights, and their share of the values', for a block of queries of one head."""
    query, head = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(1) % heads
    image = (tl.program_id(1) // heads).to(tl.int64)
    live, channels = query < length, tl.arange(0, breadth)
    wide = channels < dim
    row = (image * length + query) * heads + head
    kind: tl.constexpr = weights.dtype.element_ty
    keep = live[:, None] & wide[None, :]
    vector = tl.load(grad + row[:, None] * dim + channels[None, :], mask=keep, other=0.0).to(kind)
    for level in range(levels):
        height, width = tl.load(sizes + 3 * level), tl.load(sizes + 3 * level + 1)
        base = ((image * length + tl.load(sizes + 3 * level + 2)) * heads + head) * dim
        table, spread = value + base, grad_value + base + channels[None, :]
        for point in range(points):
            at = (row * levels + level) * points + point
            left, top, x, y = _place(places, at, live, height, width)
            a, at_a, in_a = _corner(table, left, top, height, width, heads * dim, channels, wide, kind)
            b, at_b, in_b = _corner(table, left + 1, top, height, width, heads * dim, channels, wide, kind)
            c, at_c, in_c = _corner(table, left, top + 1, height, width, heads * dim, channels, wide, kind)
            d, at_d, in_d = _corner(table, left + 1, top + 1, height, width, heads * dim, channels, wide, kind)
            weight = tl.load(weights + at, mask=live, other=0.0)
            upper, lower = a + x * (b - a), c + x * (d - c)
            along_x = (b - a) + y * ((d - c) - (b - a))
            tl.store(grad_weights + at, tl.sum((upper + y * (lower - upper)) * vector, 1), mask=live)
            tl.store(grad_places + 2 * at, weight * tl.sum(along_x * vector, 1), mask=live)
            tl.store(grad_places + 2 * at + 1, weight * tl.sum((lower - upper) * vector, 1), mask=live)
            shared = weight[:, None] * vector
            below = y * shared
            above = shared - below
            tl.atomic_add(spread + at_a[:, None], (1 - x) * above, mask=in_a & keep, sem="relaxed")
            tl.atomic_add(spread + at_b[:, None], x * above, mask=in_b & keep, sem="relaxed")
            tl.atomic_add(spread + at_c[:, None], (1 - x) * below, mask=in_c & keep, sem="relaxed")
            tl.atomic_add(spread + at_d[:, None], x * below, mask=in_d & keep, sem="relaxed")


def attend_triton(value: Tensor, places: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Value (B, S, H, D), places (B, S, H, L, P, 2) in pixels, weights (B, S, H, L, P) -> (B, S, H x D)."""
    value, places, weights = (tensor.contiguous() for tensor in (value, places, weights))
    output = torch.empty_like(value)
    _launch(_forward, (value, places, weights, output), value, places, shapes)
    return output.flatten(2)


def attend_triton_backward(
    value: Tensor, places: Tensor, weights: Tensor, grad_output: Tensor, shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, places and weights, in their shapes and types, given that of the output, (B, S, H x D)."""
    value, places, weights = (tensor.contiguous() for tensor in (value, places, weights))
    wide = torch.promote_types(value.dtype, torch.float32)
    grads = torch.zeros_like(value, dtype=wide), torch.empty_like(places), torch.empty_like(weights)
    _launch(_backward, (value, places, weights, grad_output.contiguous(), *grads), value, places, shapes)
    return grads[0].to(value.dtype), grads[1], grads[2]


def _launch(kernel: Any, tensors: Sequence[Tensor], value: Tensor, places: Tensor, shapes: Shapes) -> None:
    """Run a kernel over blocks of queries and the heads of all images, on the device of the tensors."""
    batch, length, heads, dim = value.shape
    levels, points = places.shape[3:5]
    grid = (triton.cdiv(length, QUERIES_AT_ONCE), batch * heads)
    constants = {
        "heads": heads, "levels": levels, "points": points, "dim": dim, "breadth": triton.next_power_of_2(dim),
        "block": QUERIES_AT_ONCE,
    }  # fmt: skip
    sizes = _sizes(tuple(map(tuple, shapes)), value.device)
    with torch.cuda.device_of(value):  # does nothing for CPU tensors, which Triton's interpreter takes
        kernel[grid](*tensors, sizes, length, **constants)


@lru_cache(maxsize=64)
def _sizes(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 (L, 3): height, width and first position of each level. Kept, so that a copy is not awaited every time."""
    starts = [sum(height * width for height, width in shapes[:level]) for level in range(len(shapes))]
    rows = [[*shape, start] for shape, start in zip(shapes, starts, strict=True)]
    return torch.tensor(rows, dtype=torch.int32, device=device)
