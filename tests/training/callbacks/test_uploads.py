"""Uploads at saves. (The Trainer's own upload is refused: tests/training/test_trainer.py.)"""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.training.callbacks.uploads import hub_target, upload_callbacks
from tests.hub.folder import write_model
from tests.hub.loopback import hub_of_this_process

QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True}
EVERY_SAVE: dict[str, Any] = {**QUIET, "push_to_hub": True, "hub_strategy": "every_save"}


def test_a_failed_upload_at_a_save_is_logged_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path / "checkpoint-3")
    args = TrainArguments(output_dir=str(tmp_path), hub_model_id="me/pets", **EVERY_SAVE)
    (callback,) = upload_callbacks(args)
    state, control = TrainerState(global_step=3), TrainerControl()
    with hub_of_this_process(monkeypatch) as hub:
        callback.on_save(args, state, control)
        callback.wait()  # type: ignore[attr-defined]
        assert {"model.safetensors", "README.md"} <= set(hub.files)
        hub.failures["/api/"] = [403] * 5
        callback.on_save(args, state, control)
        callback.wait()  # type: ignore[attr-defined]
    assert "step 3: Uploading" in caplog.text


def test_only_the_main_rank_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "checkpoint-3")
    args = TrainArguments(output_dir=str(tmp_path), hub_model_id="me/pets", **EVERY_SAVE)
    (callback,) = upload_callbacks(args)
    with hub_of_this_process(monkeypatch) as hub:
        callback.on_save(args, TrainerState(global_step=3, is_world_process_zero=False), TrainerControl())
        assert not hub.requests


def test_saves_are_uploaded_only_where_the_recipe_asks_for_it() -> None:
    assert upload_callbacks(TrainArguments(push_to_hub=True, **QUIET)) == []
    with pytest.raises(RecipeError, match="expected end or every_save, got checkpoint"):
        TrainArguments(hub_strategy="checkpoint", **QUIET)


def test_the_repository_is_named_by_the_recipe_or_by_the_output_folder() -> None:
    given = TrainArguments(output_dir="runs/a", hub_model_id="me/pets", hub_private_repo=True, **QUIET)
    assert (hub_target(given).repo_id, hub_target(given).private) == ("me/pets", True)
    assert hub_target(TrainArguments(output_dir="runs/a", **QUIET)).repo_id == "a"
