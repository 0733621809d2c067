"""Multi-scale deformable attention (Zhu et al. 2021, https://arxiv.org/abs/2010.04159, eq. 3) with low memory.

transformers' version keeps every sampled value for the backward pass. Here samples are recomputed in backward, so that
only the inputs are kept. The operation is an operator registered with torch, which `torch.compile` leaves whole. It has
three implementations: on a CPU, whole rows are sampled instead of single channels (deformable_cpu.py); on CUDA, Triton
kernels (deformable_triton.py), once they have given the reference's numbers faster than it on this device; everywhere
else torch's `grid_sample` (deformable_grid.py), which is the reference. `M2F_TRITON=0` in the environment turns the
Triton kernels off.
"""

import logging
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .attention import exporting
from .deformable_cpu import attend_rows, attend_rows_backward
from .deformable_grid import attend_grid, attend_grid_backward

logger = logging.getLogger(__name__)

OPERATORS = re.sub(r"\W", "_", __name__)
"""Namespace of the operators. A copy of this file that is loaded from a saved folder registers its own."""

Shapes = Sequence[tuple[int, int]]
Forward = Callable[[Tensor, Tensor, Tensor, Shapes], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Shapes], tuple[Tensor, Tensor, Tensor]]


def deformable_attention(value: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """Return the attended values (B, S, heads x D), in the type of `value`.

    value (B, S, heads, D); places (B, S, heads, L, P, 2) as (x, y) in pixels of each level, 0 being the first one's
    centre; weights (B, S, heads, L, P), summing to 1 over L x P. S runs over all positions of all levels, in the order
    of `shapes`. An exported model holds torch's `grid_sample`, or gathers (see `exported_as`), because other runtimes
    lack the operator.
    """
    if exporting():
        return _exported.get()(value, places, weights, shapes)
    output: Tensor = attend(value, places, weights, [side for shape in shapes for side in shape])
    return output


_exported: ContextVar[Forward] = ContextVar("exported", default=attend_grid)


@contextmanager
def exported_as(implementation: Forward) -> Iterator[None]:
    """Make exports within this context hold another implementation than `attend_grid`."""
    token = _exported.set(implementation)
    try:
        yield
    finally:
        _exported.reset(token)


@torch.library.custom_op(f"{OPERATORS}::attend", mutates_args=())
def attend(value: Tensor, places: Tensor, weights: Tensor, sides: Sequence[int]) -> Tensor:
    """`deformable_attention` as an operator; `sides` are height and width of each level in turn."""
    forward, _ = implementation(value.device)
    return forward(value, places, weights, _shapes(sides))


@torch.library.custom_op(f"{OPERATORS}::attend_backward", mutates_args=())
def attend_backward(
    value: Tensor, places: Tensor, weights: Tensor, grad_output: Tensor, sides: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, places and weights, in their shapes and types, from that of the output."""
    _, backward = implementation(value.device)
    return backward(value, places, weights, grad_output, _shapes(sides))


def _shapes(sides: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sides[::2], sides[1::2], strict=True))


@attend.register_fake
def _output_like(value: Tensor, places: Tensor, weights: Tensor, sides: Sequence[int]) -> Tensor:
    return value.new_empty(*value.shape[:2], value.shape[2] * value.shape[3])


@attend_backward.register_fake
def _gradients_like(*tensors: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in tensors[:3])


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sides = inputs
    ctx.save_for_backward(*tensors)


def _backward_of(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_backward(*ctx.saved_tensors, grad_output, ctx.sides), None


attend.register_autograd(_backward_of, setup_context=_keep_inputs)


@lru_cache
def implementation(device: torch.device) -> tuple[Forward, Backward]:
    """The fastest correct implementation on a device. On CUDA the first call checks and times the Triton kernels."""
    if device.type == "cpu":
        return attend_rows, attend_rows_backward
    reference = attend_grid, attend_grid_backward
    if device.type != "cuda" or os.environ.get("M2F_TRITON") == "0":
        return reference
    try:
        from .deformable_triton import attend_triton, attend_triton_backward

        kernels = attend_triton, attend_triton_backward
        check_equal(kernels, reference, device)
        ratio = _milliseconds(reference, device) / _milliseconds(kernels, device)
    except Exception as error:  # whatever a compiler or a driver raises: training goes on with the reference
        logger.warning(
            f"deformable attention on {device} uses torch's grid_sample, not the Triton kernels, which are usually "
            f"several times as fast. They failed here: {type(error).__name__}: {str(error)[:300]}"
        )
        return reference
    logger.info(
        f"deformable attention on {device}: Triton kernels are {ratio:.1f} times as fast as torch's grid_sample"
    )
    return kernels if ratio > 1 else reference


def check_equal(kernels: tuple[Forward, Backward], reference: tuple[Forward, Backward], device: torch.device) -> None:
    """Compare outputs and gradients in float32, with places inside and outside of uneven levels.

    Raises AssertionError when they differ by more than float32's rounding.
    """
    inputs, grad_output, shapes = _example(((5, 7), (1, 9), (6, 2)), 1, device)
    inputs[1][:, 1::7] = torch.nan
    tensors = [kernels[0](*inputs, shapes), *kernels[1](*inputs, grad_output, shapes)]
    inputs[1].nan_to_num_(-9.0)  # outside, where grid_sample reads zeros too
    expected = [reference[0](*inputs, shapes), *reference[1](*inputs, grad_output, shapes)]
    for mine, theirs in zip(tensors, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def _example(shapes: Shapes, batch: int, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Shapes]:
    """Random inputs with the original's 8 heads of 32 channels and 4 points, 4 pixels around each level at most."""
    generator = torch.Generator().manual_seed(0)
    length, heads, points = sum(height * width for height, width in shapes), 8, 4
    value = torch.randn(batch, length, heads, 32, generator=generator)
    sizes = torch.tensor([[width, height] for height, width in shapes]).unsqueeze(1) + 8.0
    places = torch.rand(batch, length, heads, len(shapes), points, 2, generator=generator) * sizes - 4.5
    weights = torch.rand(places.shape[:-1], generator=generator)
    grad_output = torch.randn(batch, length, heads * 32, generator=generator)
    return (value.to(device), places.to(device), weights.to(device)), grad_output.to(device), shapes


def _milliseconds(functions: tuple[Forward, Backward], device: torch.device) -> float:
    """Median time of forward and backward on an image of 512 x 512."""
    inputs, grad_output, shapes = _example(((16, 16), (32, 32), (64, 64)), 2, device)
    times = []
    for _ in range(8):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record(torch.cuda.current_stream(device))
        functions[0](*inputs, shapes)
        functions[1](*inputs, grad_output, shapes)
        events[1].record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        times.append(events[0].elapsed_time(events[1]))
    return float(statistics.median(times[2:]))


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
