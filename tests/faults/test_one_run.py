"""Two runs in one folder, another run's checkpoints, changed settings."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from m2f_trainer.training.checkpointing.resume import newest_complete
from tests.faults.tiny import Started, at_step, die, losses, options, train

VARIANTS: dict[str, dict[str, Any]] = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 1},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "train_data": {"max_train_samples": 5},
    "seed": {"seed": 7},
    "learning_rate": {"learning_rate": 2e-3},
    "max_steps": {"max_steps": 9},
    "image_height": {"image_height": 128},
    "tune": {"tune": "frozen"},
}


def test_a_second_run_in_the_folder_is_refused_at_once(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = Started(tmp_path / "first", options(data, output), partial(at_step, 1, partial(time.sleep, 3)))
    first.wait_for("  loss ")
    start = time.monotonic()
    second = train(tmp_path / "second", options(data, output, resume_from_checkpoint="auto"))
    assert time.monotonic() - start < 2
    assert second.status == 1
    assert f"{output} is in use by another run (process {first.processes[0].pid} on " in second.text
    assert first.join()[0].status == 0


@pytest.mark.slow
def test_the_lock_of_a_killed_run_is_taken_over_although_its_workers_live(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = Started(tmp_path / "first", options(data, output, dataloader_num_workers=2))
    first.wait_for("  loss ")
    first.signal(9)
    first.processes[0].join()
    second = train(
        tmp_path / "second", [*options(data, output, dataloader_num_workers=2), "--overwrite_output_dir", "true"]
    )
    first.join()
    assert second.status == 0, second.text[-2000:]
    assert "took over the lock of a run that has ended" in second.text


def test_another_runs_checkpoints_are_neither_mixed_nor_lost(data: Path, whole: Path) -> None:
    ran = train(data.parent / "log", options(data, whole))
    assert ran.status == 1
    assert f"{whole} holds the checkpoints of another run, up to step 6" in ran.text
    assert newest_complete(whole) == whole / "checkpoint-6"


def refused(name: str, data: Path, whole: Path) -> None:
    ran = train(data.parent / "log", options(data, whole, resume_from_checkpoint=True, **VARIANTS[name]))
    assert ran.status == 1, ran.text[-2000:]
    assert f"{name} was " in ran.text.split("m2f train: ")[-1]


@pytest.mark.parametrize("name", ["per_device_train_batch_size"])
def test_changed_settings_are_refused_by_name(name: str, data: Path, whole: Path) -> None:
    refused(name, data, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_changed_setting_is_refused_by_name(name: str, data: Path, whole: Path) -> None:
    refused(name, data, whole)


@pytest.mark.slow
def test_another_number_of_ranks_is_refused(data: Path, whole: Path) -> None:
    ran = Started(data.parent / "log", options(data, whole, resume_from_checkpoint=True), ranks=2).join()
    assert "world_size was 1, is 2" in ran[0].text
    assert ran[0].status == 1


@pytest.mark.slow
def test_allowed_changes_go_on_at_the_same_sample(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train(tmp_path / "log", options(data, output, max_steps=4)).status == 0
    fields = {"per_device_train_batch_size": 1, "max_steps": 10, "learning_rate": 5e-4, "allow_changes": True}
    ran = train(tmp_path / "log", options(data, output, resume_from_checkpoint=True, **fields))
    assert ran.status == 0, ran.text[-2000:]
    assert "per_device_train_batch_size was 2, is 1" in ran.text
    assert sorted(losses(output)) == [8, 9, 10]  # 7 of 7 images were seen after 4 steps of 2, and after 7 of 1


@pytest.mark.slow
def test_a_run_resumed_from_an_earlier_checkpoint_sets_later_ones_aside(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train(tmp_path / "log", options(data, output)).status == 0
    earlier = options(data, output, resume_from_checkpoint=str(output / "checkpoint-2"))
    ran = train(tmp_path / "log", earlier, partial(at_step, 5, die))
    assert ran.status == -9
    assert newest_complete(output) == output / "checkpoint-4"
    assert (output / "set-aside-checkpoint-6").is_dir()
