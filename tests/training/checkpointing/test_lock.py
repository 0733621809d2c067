"""One run per folder."""

import multiprocessing
from pathlib import Path

import pytest

from m2f_trainer.errors import TrainingError
from m2f_trainer.run_folder import LOCK
from m2f_trainer.training.checkpointing.checkpoints import run_lock


def hold(folder: Path) -> str:
    """What a process gets that wants the folder."""
    try:
        with run_lock(folder):
            return "held"
    except TrainingError as error:
        return str(error)


def in_another_process(folder: Path) -> str:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(hold, (folder,))


def test_a_held_folder_is_refused_with_process_and_host(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        refusal = in_another_process(tmp_path)
    assert refusal.startswith(f"{tmp_path} is in use by another run (process ")
    assert in_another_process(tmp_path) == "held"


def test_a_lock_that_nobody_holds_is_taken_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "elsewhere"}')
    with run_lock(tmp_path):
        assert "took over from a run that is gone (process 1 on elsewhere)" in caplog.text
    assert (tmp_path / LOCK).read_text() == ""


def test_a_failed_run_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    assert in_another_process(tmp_path) == "held"
