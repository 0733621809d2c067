"""What a run takes: its hardware, time and memory, kept in trainer_state.json over all its resumptions."""

import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from m2f_trainer import __version__
from m2f_trainer.training.callbacks import peak_memory


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
