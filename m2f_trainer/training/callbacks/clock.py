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

    All wall time counts: the seconds before the first step (`passed`), evaluations and checkpoints. The schedule covers
    the time from the first step (at `first_step` seconds) to the end: computing kept features can take a tenth of a
    run, which would use up the warm-up. A checkpoint stores both times, and a resumed run has the rest. The last step
    is evaluated and saved. `state.max_steps`, which progress bars and logs show, is a forecast. All ranks use the main
    process's clock.
    """

    def __init__(
        self,
        minutes: float,
        passed: float = 0.0,
        first_step: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.minutes, self.passed, self.first_step, self.now = minutes, passed, first_step, now
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

    def add(self, other: "Clock") -> None:
        """Add the time that another clock has counted, of this process before its checkpoint was loaded."""
        self.passed += other.passed + other.now() - other.read_at

    def state(self) -> dict[str, Any]:
        """The values saved with a checkpoint."""
        passed = self.passed + self.now() - self.read_at
        given = {"minutes": self.minutes, "passed": passed, "first_step": self.first_step}
        return {"args": given, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Use the recipe's minutes, which may have changed since the checkpoint."""
        if isinstance(args, TrainArguments) and args.max_minutes is not None:
            self.minutes = args.max_minutes
            self.head, self.backbone = rate_factors(args, TICKS)
        self.first = (state.global_step, self.share())
        if self.first_step is None:
            resumed = state.global_step > 0  # from a checkpoint of an earlier version: its schedule began with the run
            self.first_step = 0.0 if resumed else 60 * self.minutes * self.first[1]
        if self.first[1] >= 1:
            state.max_steps = state.global_step  # a finished run that is resumed; `M2FTrainer` makes no step of it
            control.should_evaluate = control.should_save = False  # they were set when the checkpoint was saved

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rates for the elapsed time."""
        before = min((self.first_step or 0.0) / (60 * self.minutes), 1.0)
        tick = int(TICKS * max(self.share() - before, 0.0) / max(1 - before, 1e-9))
        groups = kwargs["optimizer"].param_groups
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


def clock_of(args: TrainArguments, begun: float | None) -> list[TrainerCallback]:
    """The clock of a run with `max_minutes`, started at `begun` by `time.monotonic`, or now; none for other runs."""
    passed = 0.0 if begun is None else time.monotonic() - begun
    return [] if args.max_minutes is None else [Clock(args.max_minutes, passed)]
