"""CUDA graphs: forward and backward pass of backbone, neck and decoders as two recorded graphs.

A training step starts thousands of kernels one by one. For small images that takes the host longer than the GPU takes
to run them. A graph starts all of its kernels at once. It needs fixed shapes, so the losses, which follow the number of
objects, are not part of it.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from m2f_trainer.errors import TrainingError

logger = logging.getLogger(__name__)
WARM_UP = 3
"""Passes before a recording, in which libraries choose their kernels and allocate what they keep."""
TOLERANCE = 0.05
"""Largest relative difference between a replayed and the usual pass, which differ by the order of sums."""


def can_record(arguments: TrainingArguments) -> bool:
    """Whether the steps of a run can be CUDA graphs: on one GPU, without recomputation in the backward pass.

    Several processes exchange gradients during the backward pass. Some modes of torch.compile record graphs themselves.
    """
    several = arguments.world_size > 1 or arguments.fsdp or arguments.deepspeed
    own = arguments.gradient_checkpointing or arguments.torch_compile_mode not in (None, "default")
    return arguments.device.type == "cuda" and not several and not own


class StepGraphs:
    """Replaces the forward of a model's `Body`, in training mode, with the graphs of its forward and backward pass.

    The first batch is recorded, and batches of its shapes are replayed. Others run as usual, such as the last one of an
    epoch, and so does everything if a replay does not give the gradients of the usual pass, which is logged. A call
    overwrites the outputs of the one before.
    """

    def __init__(self, body: nn.Module) -> None:
        self.body, self.usual = body, body.forward
        self.shapes: list[torch.Size] | None = None
        self.recording: Recording | None = None
        body.forward = self

    def __call__(self, pixel_values: Tensor, maps: Sequence[Tensor] | None = None) -> Any:
        """As the forward of `Body`. Raises TrainingError when the model can't be recorded."""
        if self.body.training and torch.is_grad_enabled():
            inputs = [pixel_values, *(maps or ())]
            shapes = [tensor.shape for tensor in inputs]
            if self.shapes is None:
                self.shapes, self.recording = shapes, self._record(inputs)
            if self.recording is not None and shapes == self.shapes:
                return Replay.apply(self.recording, *inputs, *self.recording.parameters)  # type: ignore[no-untyped-call]
        return self.usual(pixel_values, maps)

    def release(self) -> None:
        """Free the graphs' memory, which holds the activations of a step; the next training batch is recorded anew."""
        if self.recording is not None:
            self.shapes = self.recording = None

    def _record(self, inputs: Sequence[Tensor]) -> "Recording | None":
        device = inputs[0].device
        kind, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)

        def forward(pixel_values: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast(device.type, kind, enabled, cache_enabled=False):  # each replay converts the weights
                outputs: tuple[Tensor, ...] = self.usual(pixel_values, maps or None)
            return outputs

        parameters = [parameter for parameter in self.body.parameters() if parameter.requires_grad]
        try:
            generators = torch.random.fork_rng([device.index] if device.index is not None else [])
            with generators, torch.autocast(device.type, enabled=False):  # as in the backward pass
                recording = Recording(forward, inputs, parameters)
        except RuntimeError as error:  # of CUDA or torch; the generator of random numbers stays unusable
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"a training step of this model can't be recorded as CUDA graphs: {reason}. Set cuda_graphs to false, "
                "or with too little memory give fewer images per batch"
            ) from error
        torch.cuda.empty_cache()  # what the warm-up used
        if recording.difference <= TOLERANCE:
            return recording
        logger.warning(
            "cuda_graphs: not used, since a replayed step differs from the usual one by %.2g of the gradients",
            recording.difference,
        )
        return None


class Recording:
    """The graphs of a forward and backward pass, and the tensors that they read and write.

    `forward` takes `inputs` and returns tensors that all require gradients. `gradients` are those of `parameters`, None
    for one that `forward` does not use. `difference` is that of a replay from the usual pass, relative to its norm.
    """

    def __init__(
        self, forward: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        self.parameters = parameters
        self.inputs = [tensor.detach().clone() for tensor in inputs]
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                torch.manual_seed(0)  # as before the replay below
                outputs = forward(*self.inputs)
                self.output_gradients = [torch.randn_like(output) for output in outputs]
                gradients = self._gradients(outputs)
            expected = [output.detach() for output in outputs], gradients
            del outputs  # and with it the graph of autograd, whose nodes belong to the side stream
        here.wait_stream(side)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward):
            outputs = forward(*self.inputs)
        with torch.cuda.graph(self.backward, pool=self.forward.pool()):
            self.gradients = self._gradients(outputs)
        self.outputs = [output.detach() for output in outputs]
        torch.manual_seed(0)
        self.forward.replay()
        self.backward.replay()
        self.difference = max(map(relative_difference, (self.outputs, self.gradients), expected))

    def _gradients(self, outputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(outputs, self.parameters, self.output_gradients, allow_unused=True)


@torch.no_grad()
def relative_difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The norm of found - expected, as one vector, relative to that of expected.

    Infinite for NaN, and where one is None and the other isn't.
    """
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    lone = sum((a is None) != (b is None) for a, b in zip(found, expected, strict=True))
    apart = torch.stack([(a - b).float().norm() for a, b in pairs]).norm()
    ratio = float(apart / torch.stack([b.float().norm() for _, b in pairs]).norm())
    return ratio if ratio == ratio and not lone else float("inf")


class Replay(torch.autograd.Function):
    """A recording as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs and parameters of the recording -> its outputs."""
        ctx.recording = recording
        for own, given in zip(recording.inputs, tensors, strict=False):  # the parameters follow
            own.copy_(given)
        recording.forward.replay()
        return tuple(output.detach() for output in recording.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters, as copies: autograd may keep them while the next batch is replayed."""
        recording: Recording = ctx.recording
        for own, given in zip(recording.output_gradients, output_gradients, strict=True):
            own.copy_(given)
        recording.backward.replay()
        copies = iter(torch._foreach_mul([gradient for gradient in recording.gradients if gradient is not None], 1.0))
        gradients = [None if gradient is None else next(copies) for gradient in recording.gradients]
        return None, *[None] * len(recording.inputs), *gradients
