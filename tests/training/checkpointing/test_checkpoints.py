"""Checkpoints are complete or absent; damage is found; one run per folder. (Kills: tests/faults/test_saves.py.)"""

import json
import multiprocessing
from pathlib import Path

import pytest

from m2f_trainer.errors import TrainingError
from m2f_trainer.run_folder import LOCK, MANIFEST, METRICS
from m2f_trainer.training.checkpointing.checkpoints import (
    checkpoints,
    damage,
    figures_of_step,
    require_space,
    rotate,
    run_lock,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-3"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "inner" / "more.json").write_text("{}")
    write_manifest(folder)
    return folder


def test_a_checkpoint_is_sound_as_it_was_written(folder: Path) -> None:
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"weight$", "model.safetensors differs from what was written"),
        (b"weight", "model.safetensors has 6 bytes instead of 7"),
        (None, "model.safetensors is missing"),
    ],
)
def test_damage_names_the_file(folder: Path, content: bytes | None, reason: str) -> None:
    path = folder / "model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    assert (damage(folder) or "").startswith(reason)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "files": {}}', '{"files": {"a": 1}}', "\x00"])
def test_a_damaged_manifest_is_no_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    assert (damage(folder) or "").startswith(MANIFEST)


def test_without_a_manifest_the_writing_was_cut_short(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert damage(folder) == "manifest.json is missing: the checkpoint was not completed"


def test_checkpoints_go_by_step_and_only_by_their_name(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "set-aside-checkpoint-11", ".removed-checkpoint-1"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 10]


def test_space_is_asked_for_with_what_is_there(tmp_path: Path) -> None:
    require_space(tmp_path, 1000)
    with pytest.raises(TrainingError, match=r"disk full: a checkpoint needs 1000000000000 MB, and \d+ MB are free in"):
        require_space(tmp_path, 10**18)


def test_a_checkpoint_without_an_evaluation_of_its_own_step_says_so() -> None:
    assert figures_of_step({"eval_map": 0.5, "step": 4}, 4) == {"eval_map": 0.5, "step": 4}
    assert figures_of_step({"eval_map": 0.5, "step": 4}, 5) == {"step": 5, "evaluated": False}


def test_a_checkpoint_of_a_stop_replaces_no_evaluated_one_and_is_removed_later(tmp_path: Path) -> None:
    def save(step: int, evaluated: bool, best: int | None = None) -> list[int]:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        latest = {"eval_map": 0.5, "step": step if evaluated else step - 1}
        (folder / METRICS).write_text(json.dumps(figures_of_step(latest, step)))
        write_manifest(folder)
        rotate(tmp_path, 2, best, step)
        return [step for step, _ in checkpoints(tmp_path)]

    assert save(10, True) == [10]
    assert save(20, True) == [10, 20]
    assert save(23, False, best=10) == [10, 20, 23]
    assert save(30, True, best=10) == [10, 30]
    assert save(33, False, best=30) == [10, 30, 33]
    assert save(36, False, best=30) == [10, 30, 36]
    assert save(40, True, best=30) == [30, 40]


def test_a_checkpoint_in_use_is_removed_at_a_later_save(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_manifest(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 1, None, 30, in_use={10})
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 30]
    rotate(tmp_path, 1, None, 30)
    assert [step for step, _ in checkpoints(tmp_path)] == [30]


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


def test_a_lock_that_nobody_holds_is_taken_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "elsewhere"}')
    with run_lock(tmp_path):
        assert "took over the lock of a run that has ended (process 1 on elsewhere)" in caplog.text
    assert (tmp_path / LOCK).read_text() == ""


def test_a_failed_run_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    assert in_another_process(tmp_path) == "held"
