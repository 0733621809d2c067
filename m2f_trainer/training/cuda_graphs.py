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

Forward = Callable[..., tuple[Tensor, ...]]


def can_record(arguments: TrainingArguments) -> bool:
    """Whether the steps of a run can be CUDA graphs.

    One GPU in one process. With accumulation, the gradients of a batch would overwrite those of the batch before; with
    several processes, gradients are exchanged during the backward pass.
    """
    several = arguments.world_size > 1 or arguments.fsdp or arguments.deepspeed
    other = arguments.gradient_accumulation_steps > 1 or arguments.gradient_checkpointing or arguments.torch_compile
    return arguments.device.type == "cuda" and not several and not other


class StepGraphs:
    """Replaces the forward of a module, in training mode, with a recorded graph of its forward and backward pass.

    The first batch is recorded (torch.cuda.make_graphed_callables), and batches of its shapes are replayed. Others run
    as usual, such as the last one of an epoch, and so does everything if recording fails, which is logged.

    The tensors that a call returns, and the gradients of the parameters, are overwritten by the next call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.usual = module, module.forward
        self.shapes: list[torch.Size] | None = None
        self.replay: Forward | None = None
        module.forward = self

    def __call__(self, pixel_values: Tensor, maps: Sequence[Tensor] | None = None) -> Any:
        """As the forward of `Body`."""
        inputs = [pixel_values, *(maps or ())]
        shapes = [tensor.shape for tensor in inputs]
        if self.module.training and torch.is_grad_enabled():
            if self.shapes is None:
                self.shapes, self.replay = shapes, self._record(inputs)
            if self.replay is not None and shapes == self.shapes:
                return self.replay(*inputs)
        return self.usual(pixel_values, maps)

    def release(self) -> None:
        """Free the graph's memory, which holds the activations of a step; the next training batch is recorded anew."""
        self.shapes = self.replay = None

    def _record(self, inputs: Sequence[Tensor]) -> Forward | None:
        device = inputs[0].device
        examples = tuple(tensor.detach().clone() for tensor in inputs)
        recorded = _Recorded(self.module, self.usual)
        try:
            with torch.random.fork_rng([device.index]), torch.autocast("cuda", enabled=False):
                replay: Any = torch.cuda.make_graphed_callables(recorded, examples, allow_unused_input=True)
        except RuntimeError as error:  # of CUDA or torch: out of memory, or an operation that can't be recorded
            reason = str(error).strip().splitlines()[0]
            logger.warning("this model can't be recorded as a CUDA graph, so steps take longer: %s", reason)
            replay = None
        torch.cuda.empty_cache()  # what the warm-up used
        return replay  # type: ignore[no-any-return]


class _Recorded(nn.Module):
    """The usual forward of a module, as make_graphed_callables takes it: tensors only, and no cache of autocast."""

    def __init__(self, module: nn.Module, usual: Forward) -> None:
        super().__init__()
        self.module, self.usual = module, usual
        self.autocast = {"dtype": torch.get_autocast_dtype("cuda"), "enabled": torch.is_autocast_enabled("cuda")}

    def forward(self, pixel_values: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        """Inputs as those of `Body`, the maps one by one."""
        with torch.autocast("cuda", **self.autocast, cache_enabled=False):  # type: ignore[arg-type]
            return self.usual(pixel_values, maps or None)
