"""A run that is asked to stop: it finishes its step, saves, and ends with status 75."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2f_trainer.distributed import any_rank
from m2f_trainer.errors import RunStopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO = 1.0  # seconds in which a second signal is the first one again: launchers pass on what processes got already


class StopOnSignal(TrainerCallback):
    """Notes SIGTERM, SIGINT and SIGUSR1 while entered; a second one ends the process at once.

    While training, the ranks agree after each step whether any of them was asked to stop; then all save, and RunStopped
    is raised. An evaluation or a save that is under way is finished first. Before and after the training there is
    nothing to save, and it is raised at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.since = 0.0
        self.training = False
        self.stopping = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self.since = signal.Signals(number), now
        elif now - self.since > ECHO:
            os._exit(128 + number)
        if not self.training and not self.stopping:
            self.stopping = True
            raise RunStopped(f"stopped by {self.received.name} outside of the training; nothing is lost")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is something to save."""
        self.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint, without an evaluation unless one is due.

        After the last step of an epoch it is left to the epoch's own save, where that is the rhythm.
        """
        if self._agreed(args.device):
            epoch_saves = str(args.save_strategy) == "epoch" and float(state.epoch or 0).is_integer()
            control.should_save = control.should_save or not epoch_saves

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here if asked to, before or during the save."""
        self._stop_if_agreed(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All steps are saved by now."""
        self._stop_if_agreed(args, state)
        self.training = False

    def _stop_if_agreed(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._agreed(args.device):
            asked = self.received.name if self.received else "a signal to another rank"
            raise RunStopped(
                f"stopped by {asked}; step {state.global_step} is saved in {args.output_dir}. Go on with "
                "--resume_from_checkpoint true"
            )

    def _agreed(self, device: torch.device) -> bool:
        self.stopping = self.stopping or any_rank(self.received is not None, device)
        return self.stopping
