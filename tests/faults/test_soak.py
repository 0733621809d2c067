"""A long run: memory, open files, processes and shared memory stay as they were."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2f_trainer.training import run
from tests.faults.tiny import options, train

STEPS, WARM = 2000, 400


class Note(TrainerCallback):
    """Writes down every 20 steps what the process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step % 20 == 0:
            held = {"step": state.global_step, "rss": resident(), "files": len(entries("/proc/self/fd")), **shared()}
            with self.path.open("a") as file:
                file.write(json.dumps(held) + "\n")


def entries(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def resident() -> int:
    """Bytes in memory of this process and its data workers, each with what it shares."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in [os.getpid(), *children]]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def shared() -> dict[str, int]:
    """How many processes of this run's group there are, and shared memory files of torch's that are this process's."""
    groups = [stat.read_text().rsplit(")", 1)[1].split()[2] for stat in Path("/proc").glob("[0-9]*/stat")]
    own = list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))
    return {"processes": groups.count(str(os.getpgrp())), "shm": len(own)}


def note(path: Path) -> None:
    usual = run.run_callbacks
    run.run_callbacks = lambda args: [Note(path), *usual(args)]  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_steps_with_evaluations_hold_no_more_at_the_end(data: Path, tmp_path: Path) -> None:
    fields = {"max_steps": STEPS, "checkpointing_steps": 200, "save_total_limit": 2, "dataloader_num_workers": 2}
    shm = entries("/dev/shm")
    arguments = options(data, tmp_path / "run", **fields, per_device_train_batch_size=1)
    ran = train(tmp_path / "log", arguments, partial(note, tmp_path / "held"), timeout=3500)
    assert ran.status == 0, ran.text[-2000:]
    held = [json.loads(line) for line in (tmp_path / "held").read_text().splitlines()]
    later = [one for one in held if one["step"] > WARM]
    steps, rss = [one["step"] for one in later], [one["rss"] for one in later]
    growth = np.polyfit(steps, rss, 1)[0] * (STEPS - WARM) / np.mean(rss)
    sys.stdout.write(f"\n{rss[0] / 1e6:.0f} -> {rss[-1] / 1e6:.0f} MB, slope {growth:.2%}; {later[-1]}\n")
    assert abs(growth) < 0.05
    for name in ("files", "processes", "shm"):
        assert later[-1][name] <= max(one[name] for one in held if one["step"] <= WARM), name
    assert not {name for name in entries("/dev/shm") - shm if name.startswith("torch_")}
