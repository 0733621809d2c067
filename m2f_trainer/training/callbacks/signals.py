"""Stop a run on a signal: it finishes its step, saves, and exits with status 75."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2f_trainer.distributed import any_rank
from m2f_trainer.errors import RunStopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
Handler = Callable[[int, FrameType | None], object] | int | None
REPEAT_SECONDS = 1.0
"""Seconds within which a second signal counts as the first: launchers forward signals that every process received."""


GRACE_SECONDS = 10.0
"""Time that an evaluation has to end after a signal. Schedulers kill a process 30 to 120 seconds after their signal."""


class EvaluationStopped(Exception):  # noqa: N818 (no error of the user or the code)
    """An evaluation is broken off; `M2FTrainer.evaluate` saves instead. Never leaves this package."""


class StopOnSignal(TrainerCallback):
    """Context manager and callback that handles SIGTERM, SIGINT and SIGUSR1; a second one ends the process at once.

    During training, the ranks agree after each step whether any of them got a signal; then all save, and RunStopped is
    raised. A save in progress is finished first, and an evaluation if it ends within `GRACE_SECONDS`. Otherwise it is
    broken off, the step is saved without figures, and the resumed run begins with that evaluation. Before and after
    training there is nothing to save, and RunStopped is raised at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.since = 0.0
        self.training = False
        self.stopping = False
        self.before: dict[signal.Signals, Handler] = {}

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
        elif now - self.since > REPEAT_SECONDS:
            os._exit(128 + number)
        if not self.training and not self.stopping:
            self.stopping = True
            raise RunStopped(f"stopped by {self.received.name} before or after the training; no progress is lost")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on a signal leads to a checkpoint."""
        self.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint, without an evaluation unless one is due.

        At the last step of an epoch the epoch's own save is used, where checkpoints are written per epoch.
        """
        if self._agreed(args.device):
            epoch_saves = str(args.save_strategy) == "epoch" and float(state.epoch or 0).is_integer()
            control.should_save = control.should_save or not epoch_saves

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise EvaluationStopped on all ranks if a signal came to any of them `GRACE_SECONDS` ago."""
        late = self.received is not None and time.monotonic() - self.since > GRACE_SECONDS
        if self.training and any_rank(late, args.device):
            self.stopping = True
            raise EvaluationStopped

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise RunStopped if a signal came before or during the save."""
        self._stop_if_agreed(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise RunStopped if a signal came: all steps are saved by now."""
        self._stop_if_agreed(args, state)
        self.training = False

    def _stop_if_agreed(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._agreed(args.device):
            cause = self.received.name if self.received else "a signal to another rank"
            raise RunStopped(
                f"stopped by {cause}; step {state.global_step} is saved in {args.output_dir}. Continue with "
                "--resume_from_checkpoint true"
            )

    def _agreed(self, device: torch.device) -> bool:
        self.stopping = self.stopping or any_rank(self.received is not None, device)
        return self.stopping
