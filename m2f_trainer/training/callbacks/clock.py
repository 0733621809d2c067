"""Runs limited by time: learning rate and end follow the elapsed share of `max_minutes`, not the number of steps."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.training.optimizer import rate_factors

TICKS = 10_000
"""Steps of the schedule that the minutes of a run are mapped to."""


class Clock(TrainerCallback, ExportableState):
    """Sets the learning rate by the elapsed share of `max_minutes`, and stops the run when all have elapsed.

    All wall time counts: the seconds before the first step (`passed`), evaluations and checkpoints. A checkpoint stores
    the elapsed time, and a resumed run has the rest. The last step is evaluated and saved. `state.max_steps`, which
    progress bars and logs show, is a forecast. All ranks use the main process's clock.
    """

    def __init__(self, minutes: float, passed: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self.passed, self.now = minutes, passed, now
        self.read_at = now()

    def share(self) -> float:
        """Read the clock: the elapsed share of the time, from 0 to 1, the same on all ranks."""
        now = self.now()
        self.passed, self.read_at = self.passed + now - self.read_at, now
        share = min(self.passed / (60 * self.minutes), 1.0)
        if dist.is_initialized():
            shared = torch.tensor(share, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.broadcast(shared, 0)
            share = float(shared)
        return share

    def state(self) -> dict[str, Any]:
        """The values saved with a checkpoint."""
        passed = self.passed + self.now() - self.read_at
        return {"args": {"minutes": self.minutes, "passed": passed}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Use the recipe's minutes, which may have changed since the checkpoint."""
        if isinstance(args, TrainArguments) and args.max_minutes is not None:
            self.minutes = args.max_minutes
            self.head, self.backbone = rate_factors(args, TICKS)
        self.first = (state.global_step, self.share())
        if self.first[1] >= 1:
            state.max_steps = state.global_step  # a finished run that is resumed; `M2FTrainer` makes no step of it
            control.should_evaluate = control.should_save = False  # they were set when the checkpoint was saved

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rates for the elapsed time."""
        tick, groups = int(TICKS * self.share()), kwargs["optimizer"].param_groups
        for group in groups:
            factor = self.backbone if group["name"].startswith("backbone") else self.head
            group["lr"] = group["initial_lr"] * factor(tick)
        kwargs["lr_scheduler"]._last_lr = [group["lr"] for group in groups]  # the Trainer logs these

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the forecast of the number of steps, or stop the run."""
        step, share = self.first
        now = self.share()
        left = (1 - now) / max(now - share, 1e-9) * (state.global_step - step)
        state.max_steps = state.global_step + (max(2, math.ceil(left)) if now < 1 else 0)
        if now >= 1:
            control.should_training_stop = control.should_evaluate = control.should_save = True


def clock_of(args: TrainArguments, begun: float) -> list[TrainerCallback]:
    """The clock of a run with `max_minutes`, started at `begun` by `time.monotonic`; no callback for other runs."""
    return [] if args.max_minutes is None else [Clock(args.max_minutes, time.monotonic() - begun)]
