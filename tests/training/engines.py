"""Run under torchrun: `m2f` with random points that don't depend on the ranks, and FSDP or DeepSpeed on CPUs.

torchrun --nproc_per_node N -m tests.training.engines one|ddp|fsdp|deepspeed train RECIPE.json ...
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from m2f_trainer.cli.main import main
from m2f_trainer.distributed import full_tensor
from m2f_trainer.training import run, sharding
from tests.training.gradients_of_one_step import RANDOM_POINTS, same_points

GRADIENTS = "gradients.pt"


class KeepGradients(TrainerCallback):
    """Writes the gradients of the latest step, as the optimizer gets them: reduced over the ranks, and clipped."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        if state.is_world_process_zero:
            torch.save(gradients, Path(args.output_dir, GRADIENTS))


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Make runs comparable, and make accelerate use on CPUs an engine that it restricts to accelerators."""
    callbacks = run.run_callbacks
    with ExitStack() as stack:
        stack.enter_context(patch(RANDOM_POINTS, same_points))
        stack.enter_context(patch.object(run, "run_callbacks", lambda args: [*callbacks(args), KeepGradients()]))
        if name == "fsdp":
            stack.enter_context(patch.object(AcceleratorState, "__init__", sharding_start(AcceleratorState.__init__)))
            stack.enter_context(patch.object(sharding, "require_accelerators", lambda arguments: None))
        if name == "deepspeed":
            os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
            PartialState(backend="gloo")  # transformers names no backend, and accelerate finds none for CPUs
        yield


def sharding_start(original: Any) -> Any:
    """accelerate's own initialisation, except that FSDP is also used on CPUs."""

    def begin(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return begin


if __name__ == "__main__":
    with engine(sys.argv[1]):
        sys.exit(main(sys.argv[2:]))
