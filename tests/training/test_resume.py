"""Where a run goes on from, and whether it is the same run."""

import json
from pathlib import Path

import pytest

from m2f_trainer.errors import CheckpointError
from m2f_trainer.train_arguments import TrainArguments
from m2f_trainer.training import resume
from m2f_trainer.training.checkpoints import FINGERPRINT, STATE, write_manifest

FACTS = {
    "train_images": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": 1,
    "dataloader_drop_last": False, "tune": "lora",
}  # fmt: skip


def arguments(folder: Path, **fields: object) -> TrainArguments:
    return TrainArguments(output_dir=str(folder), use_cpu=True, report_to="none", **fields)  # type: ignore[arg-type]


def checkpoint(output: Path, step: int, **facts: object) -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / STATE).write_text(json.dumps({"global_step": step, "best_global_step": 2, "log_history": [1]}))
    (folder / FINGERPRINT).write_text(json.dumps({**FACTS, **facts}))
    write_manifest(folder)
    return folder


def test_auto_starts_anew_where_there_is_nothing_and_true_does_not(tmp_path: Path) -> None:
    assert resume.find_resume(arguments(tmp_path, resume_from_checkpoint="auto")) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from"):
        resume.find_resume(arguments(tmp_path, resume_from_checkpoint="true"))


def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 2)
    assert resume.find_resume(arguments(tmp_path, resume_from_checkpoint=str(folder))) == folder
    (folder / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state.json is missing. Say true to take the newest"):
        resume.find_resume(arguments(tmp_path, resume_from_checkpoint=str(folder)))


def test_overwriting_deletes_the_other_runs_checkpoints(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match="holds the checkpoints of another run, up to step 2"):
        resume.find_resume(arguments(tmp_path))
    assert resume.find_resume(arguments(tmp_path, overwrite_output_dir=True)) is None
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_process_that_torchrun_restarted_resumes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert resume.find_resume(arguments(tmp_path, overwrite_output_dir=True)) is None
    folder = checkpoint(tmp_path, 2)
    assert resume.find_resume(arguments(tmp_path, overwrite_output_dir=True)) == folder


def test_differences_are_listed_and_another_model_is_never_taken(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    assert not resume.accept(folder, FACTS, allow_changes=False)
    changed = {**FACTS, "world_size": 2, "train_images": 11}
    with pytest.raises(CheckpointError, match=r"train_images was 10, is 11; world_size was 1, is 2. Set them back"):
        resume.accept(folder, changed, allow_changes=False)
    assert resume.accept(folder, changed, allow_changes=True)
    with pytest.raises(CheckpointError, match=r"of another model or engine: tune was 'lora', is 'full'. Start"):
        resume.accept(folder, {**FACTS, "tune": "full"}, allow_changes=True)
    (folder / FINGERPRINT).unlink()
    with pytest.raises(CheckpointError, match=r"has no fingerprint.json"):
        resume.accept(folder, FACTS, allow_changes=True)


def test_the_stand_in_counts_anew_and_links_the_rest(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 6)
    (folder / "optimizer.pt").write_bytes(b"1")
    adapted = resume.adapt(folder, tmp_path, {**FACTS, "per_device_train_batch_size": 1})
    state = json.loads((adapted / STATE).read_text())
    assert (state["global_step"], state["epoch"], state["best_global_step"]) == (12, 1.2, None)
    assert (adapted / "optimizer.pt").read_bytes() == b"1"
    assert json.loads((folder / STATE).read_text())["global_step"] == 6
