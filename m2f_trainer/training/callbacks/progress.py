"""What happens beside the steps of a run: seeds, time spent waiting, evaluation at every save; peak memory."""

import math
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback

from m2f_trainer.evaluation.coco import metrics_table
from m2f_trainer.training.data_workers import Watched
from m2f_trainer.version import __version__


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
        """Tell the dataset which epoch begins, counted as the Trainer does."""
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


class Cost(TrainerCallback, ExportableState):
    """Counts seconds from a run's begin to each save, evaluations included, and goes on counting where it resumes."""

    def __init__(self) -> None:
        self.seconds, self.peak_memory, self.processes = 0.0, 0, 1
        self.since: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock starts."""
        self.since, self.processes = time.perf_counter(), args.world_size

    def state(self) -> dict[str, Any]:
        """What is saved with a checkpoint, and read by model cards."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + (now - (self.since or now)), now
        self.peak_memory = max(self.peak_memory, peak_memory())
        told = {"seconds": round(self.seconds, 1), "peak_memory": self.peak_memory, "processes": self.processes}
        return {"args": {}, "attributes": {**told, "hardware": hardware(), "software": software()}}


def hardware() -> str:
    """The name of this process's accelerator, or of its CPU; nothing that names the machine itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {named[0] if named else platform.processor() or platform.machine()}"


def software() -> str:
    """What the numbers depend on beside the recipe."""
    versions = {"m2f_trainer": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return ", ".join(f"{name} {version}" for name, version in {**versions, "Python": platform.python_version()}.items())
