"""What a run says: lines with all that a waiting person wants, bars on terminals alone."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m2f_trainer.training.callbacks.progress import ClassTable, Lines, peak_memory
from tests.training.runs import ROOT, m2f, write_tiny

NO: Any = None
BAR, CONTROL = re.compile(r"\d+%\|"), re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def test_the_table_of_an_evaluation_tells_step_and_memory_in_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=2, max_steps=9)
    ClassTable().on_evaluate(NO, state, NO, metrics={"eval_map": 0.5, "eval_map_class/cat": 0.25, "eval_runtime": 61.0})
    out = capsys.readouterr().out
    assert "step 2 of 9, evaluated in 01:01, peak memory " in out
    assert 0.01 < peak_memory() / 2**30 < 500
    assert "cat        25.0" in out
    assert not CONTROL.search(out)


def test_a_line_tells_loss_rate_time_left_wait_and_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("m2f_trainer.training.callbacks.progress.time.perf_counter", lambda: now[0])
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=1000, max_steps=3000)
    lines = Lines()
    lines.on_train_begin(NO, state, NO)  # resumed at step 1000
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


def test_a_file_gets_lines_and_no_bars(tmp_path: Path) -> None:
    run = m2f("train", write_tiny(tmp_path, max_steps=2, disable_tqdm=False))
    assert run.returncode == 0, run.stderr
    for text in (run.stdout, run.stderr):
        assert not CONTROL.search(text)
        assert not BAR.search(text)
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
