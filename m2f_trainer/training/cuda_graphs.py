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

logger = logging.getLogger(__name__)
WARM_UP = 3
"""Passes before a recording, in which libraries choose their kernels and allocate what they keep."""


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
    epoch, and so does everything if recording fails, which is logged. A call overwrites the outputs of the one before.
    """

    def __init__(self, body: nn.Module) -> None:
        self.body, self.usual = body, body.forward
        self.shapes: list[torch.Size] | None = None
        self.recording: Recording | None = None
        body.forward = self

    def __call__(self, pixel_values: Tensor, maps: Sequence[Tensor] | None = None) -> Any:
        """As the forward of `Body`."""
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
        self.shapes = self.recording = None

    def _record(self, inputs: Sequence[Tensor]) -> "Recording | None":
        def forward(pixel_values: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
            with autocast:
                outputs: tuple[Tensor, ...] = self.usual(pixel_values, maps or None)
            return outputs

        kind, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        autocast = torch.autocast(
            "cuda", kind, enabled, cache_enabled=False
        )  # a graph converts the weights it is given
        parameters = [parameter for parameter in self.body.parameters() if parameter.requires_grad]
        recording = None
        try:
            with torch.random.fork_rng([inputs[0].device.index]), torch.autocast("cuda", enabled=False):
                recording = Recording(forward, inputs, parameters)
        except RuntimeError as error:  # of CUDA or torch: out of memory, or an operation that can't be recorded
            reason = str(error).strip().splitlines()[0]
            logger.warning("this model can't be recorded as a CUDA graph, so steps take longer: %s", reason)
        torch.cuda.empty_cache()  # what the warm-up used
        return recording


class Recording:
    """The graphs of a forward and backward pass, and the tensors that they read and write.

    `forward` takes `inputs` and returns tensors that all require gradients. `gradients` are those of `parameters`; None
    for a parameter without.
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
                outputs = forward(*self.inputs)
                _gradients(outputs, parameters, [torch.zeros_like(output) for output in outputs])
                del outputs
        here.wait_stream(side)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward):
            outputs = forward(*self.inputs)
        self.output_gradients = [torch.zeros_like(output) for output in outputs]
        with torch.cuda.graph(self.backward, pool=self.forward.pool()):
            self.gradients = _gradients(outputs, parameters, self.output_gradients)
        self.outputs = [output.detach() for output in outputs]


def _gradients(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], output_gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, parameters, output_gradients, allow_unused=True)


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
