"""What happens beside the steps of a run: seeds, time spent waiting, evaluation at every save; peak memory."""

import math
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2f_trainer.training.workers import Watched, WatchedStream


class SeedEveryStep(TrainerCallback):
    """Makes a step's randomness a function of (seed, step, rank), and an epoch's augmentation one of its number.

    So a resumed run draws what the uninterrupted one would have drawn. (The Trainer restores the generators after a
    batch was drawn, and accelerate tells datasets of the epoch on one process and at an epoch's start only.)
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the dataset which epoch begins, counted as the Trainer does; and a stream, where the run goes on."""
        if train_dataloader is not None and isinstance(train_dataloader.dataset, WatchedStream):
            each = args.gradient_accumulation_steps * int(train_dataloader.batch_size or 1)
            train_dataloader.dataset.stream.span(state.global_step * each, state.max_steps * each)
        if train_dataloader is not None and isinstance(train_dataloader.dataset, Watched):
            updates = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            train_dataloader.dataset.set_epoch(state.global_step // max(updates, 1))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seed the loss's random points, and dropout."""
        words = np.random.SeedSequence([args.seed, state.global_step, args.process_index]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))


class DataWait(TrainerCallback):
    """Adds `data_wait` to each training log: the share of the time since the last one that went into waiting for data.

    The wait runs from the end of a step, with its log, evaluation and save, to the beginning of the next.
    """

    def __init__(self) -> None:
        self.idle_since = self.logged = time.perf_counter()
        self.waited = self.evaluated = 0.0

    def _idle(self) -> None:
        self.idle_since = time.perf_counter()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here the Trainer waits for a batch."""
        self._idle()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The batch is there."""
        self.waited += time.perf_counter() - self.idle_since

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here the Trainer waits for a batch, unless there is something else to do first."""
        self._idle()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The time of an evaluation counts neither as waiting nor as training."""
        self.evaluated += time.perf_counter() - self.idle_since
        self._idle()

    on_save = on_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the share into the log, and begin anew."""
        if logs is not None and "loss" in logs:
            now = time.perf_counter()
            share = self.waited / max(now - self.logged - self.evaluated, 1e-9)
            logs["data_wait"] = state.log_history[-1]["data_wait"] = round(share, 4)
            self.logged, self.waited, self.evaluated = now, 0.0, 0.0
            self._idle()


class EvaluateAtEverySave(TrainerCallback):
    """Every checkpoint is evaluated, also the one that the Trainer writes at the last step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for an evaluation where a save was asked for: the Trainer evaluates first, then saves."""
        control.should_evaluate = control.should_evaluate or control.should_save


def peak_memory() -> int:
    """Most bytes that this process has held: on its accelerator where there is one, else in main memory."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
