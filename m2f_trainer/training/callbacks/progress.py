"""Callbacks of every run: seeds, time spent waiting for data, evaluation at every save, console output, cost.

First the callbacks that act on the training, then those that print, then `Cost`, which model cards read.
"""

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
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback

from m2f_trainer.config.training_arguments import UNKNOWN, TrainArguments
from m2f_trainer.evaluation.coco import metrics_table
from m2f_trainer.training.checkpointing.fingerprint import step_samples, updates_per_epoch
from m2f_trainer.training.data_workers import Watched
from m2f_trainer.version import __version__

EARLY_STEP = 5
"""The step after which the rate is first printed."""

CPU = "CPU "
"""What the name of a processor begins with in `hardware`."""


class SeedEveryStep(TrainerCallback):
    """Seeds each step from (seed, step, rank), and sets the dataset's epoch, on which its augmentation depends.

    A resumed run therefore draws the same random numbers as the uninterrupted one. The Trainer's own seeding is not
    enough: it restores the generators only after a batch was drawn, and accelerate sets a dataset's epoch only on one
    process and at the start of an epoch.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the dataset's epoch, counted as the Trainer does."""
        if train_dataloader is not None and isinstance(train_dataloader.dataset, Watched):
            updates = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            train_dataloader.dataset.set_epoch(state.global_step // max(updates, 1))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seed the random points of the loss, and dropout."""
        words = np.random.SeedSequence([args.seed, state.global_step, args.process_index]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))


class DataWait(TrainerCallback):
    """Adds `data_wait` to each training log: the fraction of the time since the last log spent waiting for data.

    The wait is the time from the end of a step, after its log, evaluation and save, to the start of the next.
    """

    def __init__(self) -> None:
        self.idle_since = self.logged = time.perf_counter()
        self.waited = self.evaluated = 0.0

    def _idle(self) -> None:
        self.idle_since = time.perf_counter()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The Trainer starts to wait for a batch."""
        self._idle()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The batch has arrived."""
        self.waited += time.perf_counter() - self.idle_since

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The Trainer starts to wait for a batch, unless it logs, evaluates or saves first."""
        self._idle()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The time of an evaluation or save counts neither as waiting nor as training."""
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
        """Write the fraction into the log, and restart the clocks."""
        if logs is not None and "loss" in logs:
            now = time.perf_counter()
            share = self.waited / max(now - self.logged - self.evaluated, 1e-9)
            logs["data_wait"] = state.log_history[-1]["data_wait"] = round(share, 4)
            self.logged, self.waited, self.evaluated = now, 0.0, 0.0
            self._idle()


class EvaluateAtEverySave(TrainerCallback):
    """Evaluates at every checkpoint, including the one that the Trainer writes at the last step.

    A step is evaluated and saved only once: the end of an epoch would otherwise repeat both for the last step of a run.
    """

    def __init__(self) -> None:
        self.evaluated = self.saved = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the last step that was evaluated, and then saved, before this run was resumed."""
        steps = [entry["step"] for entry in state.log_history if "eval_runtime" in entry]
        self.evaluated = self.saved = int(steps[-1]) if steps else -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request an evaluation with every save; the Trainer evaluates first, then saves."""
        control.should_evaluate = control.should_evaluate or control.should_save

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the step that was evaluated."""
        self.evaluated = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the step that was saved."""
        self.saved = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Repeat neither the evaluation nor the checkpoint of a step."""
        control.should_evaluate = control.should_evaluate and self.evaluated != state.global_step
        control.should_save = control.should_save and self.saved != state.global_step


def peak_memory() -> int:
    """Peak memory of this process in bytes: of its accelerator if there is one, else of main memory."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Bars(ProgressCallback):
    """The Trainer's progress bars without its log lines.

    The number of steps of a run with `max_minutes` is a forecast, see `Clock`: its bar has none at first, then that.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=None if state.max_steps == UNKNOWN else state.max_steps, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar on; its total is the latest forecast."""
        bar: Any = self.training_bar
        if bar is not None:
            bar.total = state.max_steps
        super().on_step_end(args, state, control)  # type: ignore[no-untyped-call]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # type: ignore[override]
        """Nothing: `Lines` prints the log."""


class Lines(TrainerCallback):
    """Prints the size of the run, the rate of its first steps, and one line for each training log; on the main process.

    The first step is slower than the others, so it doesn't count in the rate of the first steps.
    """

    def __init__(self) -> None:
        self.begun = self.warm = time.perf_counter()
        self.first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the size of the run, and start the clock by which the time left is estimated."""
        if state.is_world_process_zero and kwargs.get("train_dataloader") is not None:
            print_line(size_of_run(args, state, len(kwargs["train_dataloader"].dataset), kwargs["model"]))
        self.begun, self.first = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Print rate and time left after a few steps, unless a log does."""
        done = state.global_step - self.first
        if done == 1:
            self.warm = time.perf_counter()
        if done == EARLY_STEP and args.logging_steps > EARLY_STEP and state.is_world_process_zero:
            each = (time.perf_counter() - self.warm) / (EARLY_STEP - 1)
            print_line("  ".join([f"step {state.global_step:,}/{state.max_steps:,}", *rate_parts(state, each)]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Print a training log; `ClassTable` prints evaluations."""
        if not state.is_world_process_zero or not logs:
            return
        seconds = time.perf_counter() - self.begun
        if "loss" in logs:
            print_line("  ".join(log_parts(logs, state, seconds / max(state.global_step - self.first, 1))))
        elif "train_runtime" in logs:
            print_line(f"trained {state.global_step - self.first:,} steps in {tqdm.format_interval(seconds)}")


class ClassTable(TrainerCallback):
    """Prints a table of AP per class after each evaluation during training, on the main process."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Print the figures in percent, the duration of the evaluation and the peak memory."""
        if state.is_world_process_zero and metrics:
            prefix = next(iter(metrics)).split("_")[0] + "_"
            took = metrics.get(f"{prefix}runtime")
            parts = [f"step {state.global_step:,} of {state.max_steps:,}"]
            parts += [f"evaluated in {tqdm.format_interval(took)}"] if took is not None else []
            parts.append(f"peak memory {peak_memory() / 2**30:.1f} GiB")
            print_line(f"\n{', '.join(parts)}\n{metrics_table(metrics, prefix)}\n")


def log_parts(logs: Mapping[str, float], state: TrainerState, each: float) -> Iterator[str]:
    """The parts of a line; `each` is the mean time of a step so far in seconds, evaluations and saves included."""
    yield f"step {state.global_step:,}/{state.max_steps:,}"
    yield f"loss {logs['loss']:.4g}"
    if "learning_rate" in logs:
        yield f"rate {logs['learning_rate']:.2e}"
    yield from rate_parts(state, each)
    if "data_wait" in logs:
        yield f"waiting for data {100 * logs['data_wait']:.0f}%"
    yield f"peak memory {peak_memory() / 2**30:.1f} GiB"


def rate_parts(state: TrainerState, each: float) -> list[str]:
    """Mean time of a step in seconds, and the time left."""
    return [f"{each:.2f} s/step", f"{tqdm.format_interval((state.max_steps - state.global_step) * each)} left"]


def size_of_run(args: TrainingArguments, state: TrainerState, samples: int, model: nn.Module) -> str:
    """Samples, batch, length and trained parameters of a run."""
    facts = {**vars(args), "world_size": args.world_size, "train_images": samples}
    minutes = args.max_minutes if isinstance(args, TrainArguments) else None
    epochs = state.max_steps / updates_per_epoch(facts)
    length = f"{state.max_steps:,} steps, {epochs:.1f} epochs" if minutes is None else f"{minutes:g} minutes"
    sizes = [(parameter.numel() / 1e6, parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    return (
        f"{samples:,} training samples, {step_samples(facts)} a step, {length}; "
        f"{trained:.1f} M of {total:.1f} M parameters trained"
    )


def print_line(text: str) -> None:
    """Print above the progress bars, and flush, so that a log file can be followed."""
    tqdm.write(text)
    sys.stdout.flush()


def console(bars: bool) -> list[TrainerCallback]:
    """The callbacks that replace the Trainer's own console output."""
    return [Bars(), Lines()] if bars else [Lines()]


class Cost(TrainerCallback, ExportableState):
    """Counts seconds from the start of a run to each save, evaluations included; a resumed run continues the count."""

    def __init__(self) -> None:
        self.seconds, self.peak_memory, self.processes = 0.0, 0, 1
        self.since: float | None = None
        self.device = torch.device("cpu")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.since, self.processes, self.device = time.perf_counter(), args.world_size, args.device

    def state(self) -> dict[str, Any]:
        """The values saved with a checkpoint, which model cards read."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + (now - (self.since or now)), now
        self.peak_memory = max(self.peak_memory, peak_memory())
        cost = {"seconds": round(self.seconds, 1), "peak_memory": self.peak_memory, "processes": self.processes}
        return {"args": {}, "attributes": {**cost, "hardware": hardware(self.device), "software": software()}}


def hardware(device: torch.device) -> str:
    """The model name of the device, with `CPU` before that of a processor; nothing that identifies the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{CPU}{named[0] if named else platform.processor() or platform.machine()}"


def software() -> str:
    """Versions of the software that the results depend on."""
    versions = {"m2f_trainer": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return ", ".join(f"{name} {version}" for name, version in {**versions, "Python": platform.python_version()}.items())
