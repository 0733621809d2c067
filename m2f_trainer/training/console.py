"""What a run says while it goes: a line a log, bars on a terminal, and nothing but plain lines in a file."""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from m2f_trainer.evaluation.curves import metrics_table
from m2f_trainer.training.callbacks import peak_memory


class Bars(ProgressCallback):
    """The Trainer's progress bars without its lines."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # type: ignore[override]
        """`Lines` tells it."""


class Lines(TrainerCallback):
    """One line for each log of the training, on the main process."""

    def __init__(self) -> None:
        self.begun, self.first = time.perf_counter(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here the time left is reckoned."""
        self.begun, self.first = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Evaluations are told as tables, by `ClassTable`."""
        if not state.is_world_process_zero or not logs:
            return
        seconds = time.perf_counter() - self.begun
        if "loss" in logs:
            tell("  ".join(line(logs, state, seconds / max(state.global_step - self.first, 1))))
        elif "train_runtime" in logs:
            tell(f"trained {state.global_step - self.first:,} steps in {tqdm.format_interval(seconds)}")


class ClassTable(TrainerCallback):
    """The table of AP per class after each evaluation of a training, on the main process."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Figures in percent; with what the evaluation took."""
        if state.is_world_process_zero and metrics:
            prefix = next(iter(metrics)).split("_")[0] + "_"
            took = metrics.get(f"{prefix}runtime")
            told = [f"step {state.global_step:,} of {state.max_steps:,}"]
            told += [f"evaluated in {tqdm.format_interval(took)}"] if took is not None else []
            told.append(f"peak memory {peak_memory() / 2**30:.1f} GiB")
            tell(f"\n{', '.join(told)}\n{metrics_table(metrics, prefix)}\n")


def line(logs: Mapping[str, float], state: TrainerState, each: float) -> Iterator[str]:
    """The parts of a line; `each` is how many seconds a step has taken so far, evaluations and saves included."""
    yield f"step {state.global_step:,}/{state.max_steps:,}"
    yield f"loss {logs['loss']:.4g}"
    if "learning_rate" in logs:
        yield f"rate {logs['learning_rate']:.2e}"
    yield f"{each:.2f} s/step"
    yield f"{tqdm.format_interval((state.max_steps - state.global_step) * each)} left"
    if "data_wait" in logs:
        yield f"waiting for data {100 * logs['data_wait']:.0f}%"
    yield f"peak memory {peak_memory() / 2**30:.1f} GiB"


def tell(text: str) -> None:
    """Print above the bars, so that neither breaks the other, and at once, so that a log file can be followed."""
    tqdm.write(text)
    sys.stdout.flush()


def console(bars: bool) -> list[TrainerCallback]:
    """What takes the place of the Trainer's own printing."""
    return [Bars(), Lines()] if bars else [Lines()]
