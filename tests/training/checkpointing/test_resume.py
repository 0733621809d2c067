"""Which checkpoint a run resumes from, and whether its settings are the same."""

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import CheckpointError
from m2f_trainer.run_folder import FINGERPRINT, METRICS, RECIPE, STATE
from m2f_trainer.training import ema
from m2f_trainer.training.checkpointing import resume
from m2f_trainer.training.checkpointing.checkpoints import write_manifest
from m2f_trainer.training.checkpointing.fingerprint import SCORED_BY
from m2f_trainer.training.optimizer import Rates, parameter_groups
from tests.model.tiny import tiny_model

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
    assert resume.find_checkpoint(arguments(tmp_path, resume_from_checkpoint="auto")) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from"):
        resume.find_checkpoint(arguments(tmp_path, resume_from_checkpoint="true"))


def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 2)
    assert resume.find_checkpoint(arguments(tmp_path, resume_from_checkpoint=str(folder))) == folder
    (folder / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state.json is missing. Pass true to use the newest"):
        resume.find_checkpoint(arguments(tmp_path, resume_from_checkpoint=str(folder)))


def test_a_run_s_folder_is_no_checkpoint_and_one_of_its_own_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", 2)
    with pytest.raises(
        CheckpointError, match=r"it is a run's folder, and not one of its checkpoints, such as check.*-2"
    ):
        resume.find_checkpoint(arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "run")))


def test_the_best_checkpoint_is_found_where_its_run_is_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, elsewhere = tmp_path / "moved", tmp_path / "elsewhere"
    best, newest = checkpoint(run, 2), checkpoint(run, 4)
    elsewhere.mkdir()
    state = json.loads((newest / STATE).read_text())

    def start(recorded: Path) -> tuple[Path, str | None]:
        (newest / STATE).write_text(json.dumps({**state, "best_model_checkpoint": str(recorded), "best_metric": 0.5}))
        found = resume.find_start(newest, arguments(run), FACTS)
        assert found is not None
        now = json.loads((found / STATE).read_text())
        assert (now["best_metric"] is None) is (now["best_model_checkpoint"] is None)
        return found, now["best_model_checkpoint"]

    assert start(best) == (newest, str(best))
    assert start(tmp_path / "former" / "checkpoint-2")[1] == str(best)
    assert not caplog.records
    best.rename(tmp_path / "kept")
    assert start(elsewhere) == (newest, str(elsewhere)), "of the run that this one was resumed from"
    assert start(best)[1] is None
    assert f"{best}, the best checkpoint so far, is gone: the best is chosen among the next ones" in caplog.text


def test_changed_settings_of_the_optimizer_apply_and_the_rate_is_logged(tmp_path: Path) -> None:
    model = tiny_model()
    saved, resumed = (
        torch.optim.AdamW(parameter_groups(model, Rates(0.1, 0.0)), betas=betas, eps=eps)
        for betas, eps in (((0.9, 0.999), 1e-8), ((0.5, 0.8), 1e-3))
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(resumed, lambda _: 1.0)
    resumed.load_state_dict(saved.state_dict())
    schedule._last_lr = [0.0] * len(resumed.param_groups)
    keywords = {"model": model, "optimizer": resumed, "lr_scheduler": schedule}
    args = arguments(tmp_path, learning_rate=0.2, weight_decay=0.3)
    resume.NewSettings().on_train_begin(args, TrainerState(global_step=3), TrainerControl(), **keywords)
    for group in resumed.param_groups:
        assert (group["betas"], group["eps"]) == ((0.5, 0.8), 1e-3)
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.3, 0.0, 0.0, 0.3]
    assert schedule.get_last_lr() == pytest.approx([0.2, 0.2, 0.02, 0.02])


@pytest.mark.parametrize(
    ("name", "then", "now"),
    [
        ("valid_data", "old", "new"),
        ("image_height", 128, 64),
        ("matrix_nms", True, False),
        ("tile_overlap", 0.3, 0.4),
    ],
)
def test_a_best_figure_of_other_validation_images_or_another_evaluation_is_no_measure(
    name: str, then: Any, now: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(tmp_path, 3, **{name: then})
    for value, best in ((then, 2), (now, None)):
        assert "chosen anew" not in caplog.text
        adapted = resume.adapted_copy(folder, tmp_path, {**FACTS, name: value})
        state = json.loads((adapted / STATE).read_text())
        assert (state["best_global_step"], state["log_history"]) == (best, [1])
    assert f"no measure after a change of {name}: the best is chosen anew" in caplog.text


def test_what_an_evaluation_depends_on_is_recorded_in_every_checkpoint(finished_run: Path) -> None:
    recorded = json.loads((finished_run / "run" / "checkpoint-2" / FINGERPRINT).read_text())
    assert set(recorded) >= SCORED_BY


def test_another_runs_checkpoints_are_overwritten_only_when_asked_and_not_before_the_run_starts(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match="holds the checkpoints of another run, up to step 2"):
        resume.find_checkpoint(arguments(tmp_path))
    assert resume.find_checkpoint(arguments(tmp_path, overwrite_output_dir=True)) is None
    assert folder.is_dir()


def test_an_overwritten_run_leaves_no_model_behind_but_a_card_edited_by_hand(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    names = ("model.safetensors", "model-00001-of-00002.safetensors", "config.json", RECIPE, METRICS, "pictures/a.jpg")
    for name in (*names, "README.md", "notes.txt", "runs/events"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    resume.delete_former_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "notes.txt", "runs"]


def test_a_process_that_torchrun_restarted_resumes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert resume.find_checkpoint(arguments(tmp_path, overwrite_output_dir=True)) is None
    folder = checkpoint(tmp_path, 2)
    assert resume.find_checkpoint(arguments(tmp_path, overwrite_output_dir=True)) == folder


def test_a_restarted_process_takes_the_newest_recipe_and_a_new_run_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (4, 12):
        (checkpoint(tmp_path, step) / RECIPE).write_text("{}")
    given = {"output_dir": str(tmp_path)}
    assert resume.recipe_to_resume(given) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resume.recipe_to_resume(given) == tmp_path / "checkpoint-12" / RECIPE
    (tmp_path / "checkpoint-12" / RECIPE).write_text('{"a"')
    assert resume.recipe_to_resume(given) == tmp_path / "checkpoint-4" / RECIPE, "as its checkpoint is resumed from"


def test_nothing_to_resume_from_is_an_error_before_a_recipe_is_chosen(tmp_path: Path) -> None:
    given = {"output_dir": str(tmp_path / "typo")}
    with pytest.raises(CheckpointError, match="typo: no complete checkpoint to resume from"):
        resume.recipe_to_resume({**given, "resume_from_checkpoint": "true"})
    assert resume.recipe_to_resume({**given, "resume_from_checkpoint": "auto"}) is None
    checkpoint(tmp_path, 4)
    for folder, reason in ((tmp_path / "checkpoint-9", "there is no such folder"), (tmp_path, "it is a run's folder")):
        with pytest.raises(CheckpointError, match=reason):
            resume.recipe_to_resume({"resume_from_checkpoint": str(folder)})


def test_a_checkpoint_given_as_a_link_or_from_inside_belongs_to_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "run", 4)
    (tmp_path / "latest").symlink_to(folder)
    assert resume.run_of(tmp_path / "latest") == tmp_path / "run"
    assert resume.run_of(folder) == tmp_path / "run"
    monkeypatch.chdir(folder)
    assert resume.run_of(Path()) == tmp_path / "run"


def test_differences_are_listed_and_another_model_is_never_taken(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    assert not resume.check_changes(folder, FACTS, allow_changes=False)
    changed = {**FACTS, "world_size": 2, "train_images": 11}
    with pytest.raises(CheckpointError, match=r"train_images was 10, is 11; world_size was 1, is 2. Set them back"):
        resume.check_changes(folder, changed, allow_changes=False)
    assert resume.check_changes(folder, changed, allow_changes=True)
    with pytest.raises(
        CheckpointError, match=r"of another model, engine or optimizer: tune was 'lora', is 'full'. Start"
    ):
        resume.check_changes(folder, {**FACTS, "tune": "full"}, allow_changes=True)
    (folder / FINGERPRINT).unlink()
    with pytest.raises(CheckpointError, match=r"has no fingerprint.json"):
        resume.check_changes(folder, FACTS, allow_changes=True)


def test_a_checkpoint_whose_optimizer_state_does_not_fit_or_is_missing_is_refused(tmp_path: Path) -> None:
    facts = {**FACTS, "optim": "adamw_torch", "layer_decay": 0.8}
    folder = checkpoint(tmp_path, 4, **facts)
    for name, value in (("optim", "muon"), ("layer_decay", None)):
        with pytest.raises(CheckpointError, match=rf"of another model, engine or optimizer: {name} was"):
            resume.check_changes(folder, {**facts, name: value}, allow_changes=True)
    for name, value in (("optim", "adamw_torch_fused"), ("layer_decay", 0.7)):
        assert resume.check_changes(folder, {**facts, name: value}, allow_changes=True)
    (folder / RECIPE).write_text(json.dumps({"save_only_model": True}))
    with pytest.raises(CheckpointError, match=r"no state of the optimizer \(save_only_model\)"):
        resume.check_changes(folder, facts, allow_changes=True)


def test_another_figure_for_the_best_model_chooses_it_anew(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 6)
    state = json.loads((folder / STATE).read_text())
    stopping = {"EarlyStoppingCallback": {"attributes": {"early_stopping_patience_counter": 2}}}
    (folder / STATE).write_text(json.dumps({**state, "stateful_callbacks": stopping}))
    same = arguments(tmp_path, metric_for_best_model="eval_map_50")
    (folder / RECIPE).write_text(json.dumps({"metric_for_best_model": "eval_map_50", "greater_is_better": True}))
    assert resume.find_start(folder, same, FACTS) == folder
    other = resume.find_start(folder, arguments(tmp_path, metric_for_best_model="eval_map_75"), FACTS)
    assert other is not None
    changed = json.loads((other / STATE).read_text())
    assert (changed["best_global_step"], changed["stateful_callbacks"], changed["global_step"]) == (None, {}, 6)


def test_the_adapted_checkpoint_recounts_its_step_and_links_the_other_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 6)
    (folder / "optimizer.pt").write_bytes(b"1")
    adapted = resume.adapted_copy(folder, tmp_path, {**FACTS, "per_device_train_batch_size": 1})
    state = json.loads((adapted / STATE).read_text())
    assert (state["global_step"], state["epoch"], state["best_global_step"]) == (12, 1.2, None)
    assert (adapted / "optimizer.pt").read_bytes() == b"1"
    assert json.loads((folder / STATE).read_text())["global_step"] == 6


def test_an_average_that_is_given_up_on_resume_leaves_the_weights_it_was_made_of(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, Rates(0.1, 0.0)))
    model.class_predictor.weight.grad = torch.ones_like(model.class_predictor.weight)
    optimizer.step()
    ema.update_averages(optimizer, 0.9)
    weight = model.class_predictor.weight.detach().clone()
    optimizer.step()
    ema.update_averages(optimizer, 0.9)
    ema.swap_averages(optimizer)  # as a checkpoint holds them
    average, args = model.class_predictor.weight.detach().clone(), arguments(tmp_path)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    keywords = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
    resume.NewSettings().on_train_begin(args, TrainerState(), TrainerControl(), **keywords)
    raw = model.class_predictor.weight.detach().clone()
    assert not torch.equal(raw, average)
    torch.testing.assert_close(raw, weight - 0.1, rtol=0, atol=1e-3)
    with ema.averaged(optimizer):  # as evaluations and saves have the model
        assert torch.equal(model.class_predictor.weight, raw)


@pytest.mark.parametrize(
    ("figures", "due", "owed"),
    [({"evaluated": False}, True, True), ({"evaluated": False}, False, False), ({"eval_map": 0.5}, True, False)],
)
def test_an_evaluation_is_owed_where_it_was_due_and_has_no_figures(
    figures: dict[str, object], due: bool, owed: bool, tmp_path: Path
) -> None:
    (tmp_path / METRICS).write_text(json.dumps(figures))
    state = {"stateful_callbacks": {"TrainerControl": {"args": {"should_evaluate": due}}}}
    (tmp_path / STATE).write_text(json.dumps(state))
    assert resume.evaluation_owed(tmp_path) is owed


def test_the_private_methods_of_transformers_that_an_owed_evaluation_calls_are_there() -> None:
    assert list(signature(Trainer._determine_best_metric).parameters) == ["self", "metrics", "trial"]
    assert list(signature(Trainer._evaluate).parameters) == ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"]
    assert list(signature(Trainer._load_rng_state).parameters) == ["self", "checkpoint"]
