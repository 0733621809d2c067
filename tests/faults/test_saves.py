"""After a kill, a full disk or damage, the last complete checkpoint remains, and the run resumes from it."""

import os
import random
import resource
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from m2f_trainer.run_folder import MANIFEST
from m2f_trainer.training.checkpointing import checkpoints
from m2f_trainer.training.checkpointing.checkpoints import damage, rotate, write_manifest
from m2f_trainer.training.checkpointing.resume import newest_complete
from m2f_trainer.training.trainer import M2FTrainer
from tests.faults.tiny import Started, at_step, die, losses, options, same_weights, stop_self, train

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}


def in_save(count: int, act: Any) -> None:
    """Act at the count-th change to the file system of the save of step 4; tell how many there were."""
    save, seen, active = M2FTrainer._save_checkpoint, [], []

    def heard(event: str, values: Any) -> None:
        if active and (event in WRITES or (event == "open" and isinstance(values[2], int) and values[2] & 3)):
            seen.append(event)
            if len(seen) == count:
                act()

    def saved(self: M2FTrainer, *values: Any) -> None:
        active.extend([True] if self.state.global_step == 4 else [])
        save(self, *values)
        if active:
            sys.stdout.write(f"changes: {len(seen)}.\n")
        active.clear()

    sys.addaudithook(heard)
    patch.object(M2FTrainer, "_save_checkpoint", saved).start()


def killed_at(change: int, data: Path, whole: Path, folder: Path) -> None:
    output = folder / f"killed-{change}"
    arguments = options(data, output, save_total_limit=2)
    assert train(folder / "log", arguments, partial(in_save, change, die)).status == -signal.SIGKILL
    newest = newest_complete(output)
    assert newest is not None
    assert newest.name in ("checkpoint-2", "checkpoint-4")
    resumed = train(folder / "log", options(data, output, save_total_limit=2, resume_from_checkpoint=True))
    assert resumed.status == 0, resumed.text[-3000:]
    assert same_weights(output, whole)
    assert losses(output) == losses(whole)
    shutil.rmtree(output)


def changes(data: Path, folder: Path) -> int:
    text = train(folder / "log", options(data, folder / "count", save_total_limit=2), partial(in_save, 0, die)).text
    return int(text.split("changes: ")[1].split(".")[0])


def test_a_kill_in_the_midst_of_a_save_costs_one_interval_at_most(data: Path, whole: Path, tmp_path: Path) -> None:
    killed_at(20, data, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_a_kill_at_every_write_of_a_save(data: Path, whole: Path, tmp_path: Path) -> None:
    total = changes(data, tmp_path)
    assert total > 20
    for change in range(1, total + 1):
        killed_at(change, data, whole, tmp_path)
    sys.stdout.write(f"\n{total} write points\n")


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_a_hundred_random_kills_change_nothing(data: Path, tmp_path: Path) -> None:
    """One run, a checkpoint every step, killed again and again; each life adds to the next."""
    output, chance = tmp_path / "run", random.Random(0)
    fields = {"checkpointing_steps": 1, "save_total_limit": 2, "max_steps": 100000, "max_eval_samples": 1}
    arguments = options(data, output, resume_from_checkpoint="auto", **fields)
    reached, lost = 0, 0
    for _ in range(100):
        run = Started(tmp_path / "log", arguments)
        run.wait_for("  loss ")
        time.sleep(chance.uniform(0, 0.5))
        run.signal(signal.SIGKILL)
        logged = max(0, run.join()[0].text.count("  loss "))
        newest = newest_complete(output)
        step = int(newest.name.split("-")[1]) if newest else 0
        assert step >= reached
        lost = max(lost, reached + logged - step)
        reached = step
    assert lost <= 1
    last = train(tmp_path / "log", arguments, partial(at_step, reached, stop_self))
    assert last.status == 75
    steps = max(losses(output))
    once = options(data, tmp_path / "once", **{**fields, "checkpointing_steps": 100000})
    assert train(tmp_path / "log", once, partial(at_step, steps - 1, stop_self)).status == 75
    assert losses(tmp_path / "once") == losses(output)
    assert same_weights(tmp_path / "once" / f"checkpoint-{steps}", output / f"checkpoint-{steps}")
    sys.stdout.write(f"\n{steps} steps in 101 lives, at most {lost} lost\n")


def limit_files(size: int = 100_000) -> None:
    """From step 3 on no file may exceed the given size, which fails like a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    at_step(3, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)))


def fill_disk() -> None:
    """From step 3 on there is no space, so says the system."""
    usage = shutil._ntuple_diskusage(10, 9, 1_000)  # type: ignore[attr-defined]
    at_step(3, patch("shutil.disk_usage", lambda _: usage).start)


def test_a_disk_that_fills_up_is_named_and_the_last_checkpoint_stays(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ran = train(tmp_path / "log", options(data, output), limit_files)
    assert ran.status == 1, ran.text[-2000:]
    assert "m2f train: checkpoint 4 could not be written" in ran.text
    assert "MB are free in" in ran.text
    assert newest_complete(output) == output / "checkpoint-2"
    assert not (output / checkpoints.STAGING).exists()


@pytest.mark.slow
def test_too_little_space_is_found_before_the_save(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ran = train(tmp_path / "log", options(data, output), fill_disk)
    assert ran.status == 1
    assert "m2f train: disk full: a checkpoint needs" in ran.text
    assert newest_complete(output) == output / "checkpoint-2"


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_twenty_full_disks(data: Path, whole: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    for turn in range(20):
        output, size = tmp_path / f"run-{turn}", chance.randrange(100, 800_000)
        ran = train(tmp_path / "log", options(data, output), partial(limit_files, size))
        assert ran.status == 1, (size, ran.text[-2000:])
        assert newest_complete(output) == output / "checkpoint-2", size
        assert train(tmp_path / "log", options(data, output, resume_from_checkpoint=True)).status == 0
        assert same_weights(output, whole), size


def harm(path: Path, kind: str, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        start = chance.randrange(len(content))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    elif kind == "truncate":
        del content[chance.randrange(len(content)) :]
    path.write_bytes(content)
    if kind == "delete":
        path.unlink()


def test_damage_to_any_file_is_found_and_named(whole: Path, tmp_path: Path) -> None:
    chance, found, tried = random.Random(0), 0, 0
    files = sorted(path.name for path in (whole / "checkpoint-6").iterdir())
    while tried < 200:
        for name in files:
            for kind in ("flip", "zero", "truncate", "delete"):
                folder = tmp_path / "checkpoint-6"
                shutil.copytree(whole / "checkpoint-6", folder)
                before = (folder / name).read_bytes()
                harm(folder / name, kind, chance)
                if kind == "delete" or (folder / name).read_bytes() != before:
                    tried += 1
                    reason = damage(folder)
                    found += reason is not None and (name in reason or name == MANIFEST)
                shutil.rmtree(folder)
    assert (found, tried) == (tried, tried)


def test_resume_passes_over_what_is_damaged(data: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for step in (2, 6):
        shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
    harm(output / "checkpoint-6" / "optimizer.pt", "flip", random.Random(1))
    ran = train(tmp_path / "log", options(data, output, resume_from_checkpoint=True))
    assert ran.status == 0, ran.text[-2000:]
    assert f"skipped {output}/checkpoint-6: optimizer.pt differs from what was written" in ran.text
    assert f"resuming from {output}/checkpoint-2" in ran.text
    assert same_weights(output, whole)


def test_rotation_keeps_the_best_and_the_newest_whatever_the_clock_says(tmp_path: Path) -> None:
    chance = random.Random(0)
    for turn in range(50):
        output = tmp_path / str(turn)
        steps = sorted(chance.sample(range(1, 1000), 6))
        for step in steps:
            folder = output / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(bytes([step % 256]))
            write_manifest(folder)
            os.utime(folder, (chance.random() * 2e9,) * 2)
        stale = output / f"checkpoint-{steps[-1] + 900}"
        stale.mkdir()
        best, limit = chance.choice(steps), chance.choice([1, 2, 3])
        rotate(output, limit, best, steps[-1])
        left = {int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")} - {steps[-1] + 900}
        assert {best, steps[-1]} <= left
        assert len(left) == max(limit, len({best, steps[-1]}))
        assert newest_complete(output) == output / f"checkpoint-{steps[-1]}"
