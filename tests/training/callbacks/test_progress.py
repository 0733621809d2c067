"""Callbacks for seeds, waiting times, the cost of a run, and console output."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.distributed import any_rank
from m2f_trainer.training.callbacks.progress import (
    Bars,
    ClassTable,
    Cost,
    DataWait,
    Lines,
    SeedEveryStep,
    peak_memory,
    size_of_run,
)
from tests.training.runs import ROOT, m2f, write_tiny


def test_a_steps_random_numbers_follow_from_seed_step_and_rank_alone() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        values: Any = SimpleNamespace(seed=seed, process_index=rank), SimpleNamespace(global_step=step)
        SeedEveryStep().on_step_begin(*values, control=None)  # type: ignore[arg-type]
        return torch.rand(()).item()

    first = draw(1, 2, 0)
    torch.rand(5)
    assert draw(1, 2, 0) == first
    assert len({draw(seed, step, rank) for seed in (1, 2) for step in (2, 3) for rank in (0, 1)}) == 8


def test_the_share_of_time_spent_waiting_for_data_is_logged() -> None:
    wait = DataWait()
    state: Any = SimpleNamespace(log_history=[{"loss": 1.0}])
    no: Any = None
    wait.on_epoch_begin(no, state, no)
    time.sleep(0.06)  # waiting for a batch
    wait.on_step_begin(no, state, no)
    time.sleep(0.02)  # the step
    wait.on_step_end(no, state, no)
    logs = {"loss": 1.0}
    wait.on_log(no, state, no, logs=logs)
    assert logs["data_wait"] == state.log_history[-1]["data_wait"] == pytest.approx(0.75, abs=0.15)
    time.sleep(0.05)  # an evaluation
    wait.on_evaluate(no, state, no)
    wait.on_step_begin(no, state, no)
    time.sleep(0.02)
    wait.on_step_end(no, state, no)
    wait.on_log(no, state, no, logs=logs)
    assert logs["data_wait"] < 0.1


def test_without_other_ranks_a_vote_is_ones_own() -> None:
    device = torch.device("cpu")
    assert any_rank(True, device)
    assert not any_rank(torch.tensor(False), device)


NO: Any = None


BAR, CONTROL = re.compile(r"\d+%\|"), re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def test_the_table_of_an_evaluation_shows_step_and_memory_in_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=2, max_steps=9)
    ClassTable().on_evaluate(NO, state, NO, metrics={"eval_map": 0.5, "eval_map_class/cat": 0.25, "eval_runtime": 61.0})
    out = capsys.readouterr().out
    assert "step 2 of 9, evaluated in 01:01, peak memory " in out
    assert 0.01 < peak_memory() / 2**30 < 500
    assert "cat        25.0" in out
    assert not CONTROL.search(out)


def test_the_bar_of_a_run_of_minutes_shows_the_forecast() -> None:
    """At the start, its number of steps is unknown."""
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=10**9)
    bars = Bars()
    bars.on_train_begin(NO, state, NO)
    assert str(bars.training_bar).startswith("0it [")
    for step, forecast, shown in ((2, 40, " 2/40 ["), (10, 20, " 10/20 [")):
        state.global_step, state.max_steps = step, forecast
        bars.on_step_end(NO, state, NO)
        assert shown in str(bars.training_bar)
    bars.on_train_end(NO, state, NO)


def test_a_line_shows_loss_rate_time_left_wait_and_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("m2f_trainer.training.callbacks.progress.time.perf_counter", lambda: now[0])
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=1000, max_steps=3000)
    lines = Lines()
    args: Any = SimpleNamespace(logging_steps=100)
    lines.on_train_begin(args, state, NO)  # resumed at step 1000
    now[0], state.global_step = 103.0, 1001  # the first step is slow
    lines.on_step_end(args, state, NO)
    now[0], state.global_step = 105.0, 1005
    lines.on_step_end(args, state, NO)
    assert capsys.readouterr().out == "step 1,005/3,000  0.50 s/step  16:37 left\n"
    now[0], state.global_step = 160.0, 1120
    lines.on_log(NO, state, NO, logs={"loss": 12.3456, "learning_rate": 1e-4, "data_wait": 0.034})
    out = capsys.readouterr().out
    assert out.startswith(
        "step 1,120/3,000  loss 12.35  rate 1.00e-04  0.50 s/step  15:40 left  waiting for data 3%  peak memory "
    )
    lines.on_log(NO, state, NO, logs={"eval_map": 0.5})
    state.is_world_process_zero = False
    lines.on_log(NO, state, NO, logs={"loss": 1.0})
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "steps", "shown"),
    [
        ({}, 8, "4 a step, 8 steps, 1.0 epochs"),  # 7 steps of 4, one of 2
        ({"gradient_accumulation_steps": 3}, 3, "12 a step, 3 steps, 1.0 epochs"),  # 3, 3 and 2 batches
        ({"dataloader_drop_last": True}, 14, "4 a step, 14 steps, 2.0 epochs"),
        ({}, 4, "4 a step, 4 steps, 0.5 epochs"),
    ],
)
def test_an_epoch_whose_last_step_is_smaller_counts_as_one(
    tmp_path: Path, options: dict[str, Any], steps: int, shown: str
) -> None:
    args = TrainArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, **options)
    state: Any = SimpleNamespace(max_steps=steps)
    assert size_of_run(args, state, 30, torch.nn.Linear(2, 2)).startswith(f"30 training samples, {shown}; ")


def test_a_file_gets_lines_and_no_bars(tmp_path: Path) -> None:
    run = m2f("train", write_tiny(tmp_path, max_steps=2, disable_tqdm=False))
    assert run.returncode == 0, run.stderr
    for text in (run.stdout, run.stderr):
        assert not CONTROL.search(text)
        assert not BAR.search(text)
    assert "4 training samples, 2 a step, 2 steps, 1.0 epochs; " in run.stdout
    assert "step 2/2  loss " in run.stdout
    assert "step 2 of 2, evaluated in " in run.stdout
    assert "{'" not in run.stdout


@pytest.mark.slow
def test_a_terminal_gets_bars_too(tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path, max_steps=2, disable_tqdm=False)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 120))
    command = [sys.executable, "-m", "m2f_trainer", "train", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as run:
        os.close(theirs)
        text = "".join(everything(ours))
    os.close(ours)
    assert run.returncode == 0, text
    assert BAR.search(text)
    assert "step 2/2  loss " in text


def everything(terminal: int) -> Iterator[str]:
    """What is written to a terminal until no one has it open, which Linux tells by an error."""
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 65536):
            yield data.decode(errors="replace")


def test_a_resumed_run_continues_the_count_of_time_and_names_the_hardware() -> None:
    args: Any = SimpleNamespace(world_size=4, device=torch.device("cpu"))
    no: Any = None
    first = Cost()
    first.on_train_begin(args, no, no)
    time.sleep(0.2)
    saved = first.state()
    time.sleep(0.5)  # lost: the run was killed after its save
    second = Cost.from_state(saved)
    second.on_train_begin(args, no, no)
    time.sleep(0.2)
    attributes = second.state()["attributes"]
    assert 0.35 < attributes["seconds"] < 0.65
    assert attributes["processes"] == 4
    assert attributes["peak_memory"] > 2**20
    assert attributes["hardware"].strip()
    assert "torch 2" in attributes["software"]
