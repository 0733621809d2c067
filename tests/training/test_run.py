"""A run from recipe to model card, and everything that can be done with what it leaves."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoBackbone, TrainerCallback

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.images import open_image
from m2f_trainer.errors import CheckpointError, DataError, ModelFolderError, RecipeError
from m2f_trainer.evaluation.thresholds import class_thresholds
from m2f_trainer.inference.predict import PredictOptions, predict_folder
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.model.backbones import read_config
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.run_folder import read_details, read_metrics
from m2f_trainer.training import run, trainer
from m2f_trainer.training.callbacks.clock import Clock
from m2f_trainer.training.evaluate import evaluate_folder
from m2f_trainer.training.prepare import build_recipe_model
from m2f_trainer.training.run import train
from tests.training.runs import TINY, m2f, write_tiny


def test_a_best_figure_that_no_evaluation_has_is_refused_before_the_model_is_made(tmp_path: Path) -> None:
    recipe = str(write_tiny(tmp_path, backbone_config=None, metric_for_best_model="map50"))
    with pytest.raises(
        RecipeError, match=r"metric_for_best_model=map50: unknown metric; the nearest is eval_map_50. Known"
    ):
        train(load_recipe([recipe, "--image_height", "64", "--image_width", "64"]))


def test_ranks_on_cpus_train_one_model_together_without_being_told_of_the_cpu(tmp_path: Path) -> None:
    """Each rank would otherwise train alone, on all samples, into one folder."""
    recipe = write_tiny(
        tmp_path,
        num_queries="auto",
        use_cpu=False,
        bf16=False,
        max_steps=-1,
        num_train_epochs=1,
        checkpointing_steps="epoch",
    )
    done = m2f("train", recipe, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("4 training samples, 4 a step, 1 steps, 1.0 epochs") == 1
    assert (done.stdout + done.stderr).count("auto: num_queries = 20;") == 1, "not once for each rank"
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert json.loads((checkpoint / "fingerprint.json").read_text())["world_size"] == 2
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert json.loads((checkpoint / "recipe.json").read_text())["use_cpu"] is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"report_to": "clearml"}, "report_to=clearml: not available here; pip install clearml"),
        ({"ddp_backend": "nccl"}, "ddp_backend=nccl: not available on CPUs"),
        ({"torch_compile": True, "torch_compile_backend": "inducto"}, "torch_compile with the backend inducto"),
    ],
)
@pytest.mark.filterwarnings("default")  # torch's compiler warns at its own code
def test_what_the_machine_lacks_is_refused_before_the_data_is_read(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path, **{**fields, "dataset_name": str(tmp_path / "missing")}))])
    with pytest.raises(RecipeError, match=message):
        train(recipe)


def test_a_finished_run_that_is_resumed_trains_no_step_more_and_keeps_its_figures(tmp_path: Path) -> None:
    fields = {"max_steps": 1, "load_best_model_at_end": False, "lr_scheduler_type": "constant"}
    recipe = [str(write_tiny(tmp_path, images=(4, 1, 0), **fields))]
    first, run = train(load_recipe(recipe)), tmp_path / "run"
    weights = load_file(run / "model.safetensors")
    again = train(load_recipe([*recipe, "--resume_from_checkpoint", "true"]))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(run / "model.safetensors").items())
    assert again["eval_map"] == first["eval_map"] == read_metrics(run / "metrics.json")["eval_map"]
    assert read_details(run)["classes"]


def steps_of(run: Path) -> int:
    return int(json.loads((run / "trainer_state.json").read_text())["global_step"])


def test_a_run_that_stopped_early_trains_no_step_more_unless_the_patience_grows(tmp_path: Path) -> None:
    fields = {"max_steps": 8, "checkpointing_steps": 1, "early_stopping_patience": 1}
    fields |= {"learning_rate": 0.0, "lr_scheduler_type": "constant"}
    write_tiny(tmp_path, images=(4, 1, 0), **fields)
    command = [str(tmp_path / "recipe.json")]
    train(load_recipe(command))
    assert steps_of(tmp_path / "run") == 2, "the second figure equals the first"
    for options, steps in (([], 2), (["--early_stopping_patience", "3"], 4)):
        train(load_recipe([*command, "--resume_from_checkpoint", "true", *options]))
        assert steps_of(tmp_path / "run") == steps


def evaluations_of(run: Path) -> list[int]:
    """The steps of the evaluations in a run's log."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if "eval_map" in entry]


def test_a_run_that_stopped_early_is_resumed_without_another_evaluation_unless_its_patience_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"max_steps": 20, "checkpointing_steps": "epoch", "early_stopping_patience": 1}
    fields |= {"learning_rate": 0.0, "lr_scheduler_type": "constant"}
    command, run = [str(write_tiny(tmp_path, images=(4, 1, 0), **fields))], tmp_path / "run"
    train(load_recipe(command))
    resumed = [*command, "--resume_from_checkpoint", "true"]
    for _ in range(2):
        train(load_recipe(resumed))
        assert evaluations_of(run) == [2, 4], "two steps an epoch; the second figure equals the first"
        state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
        assert state["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"] == 1
    assert "not to be a single sample" not in caplog.text
    train(load_recipe([*resumed, "--restore_callback_states_from_checkpoint", "false"]))
    assert evaluations_of(run) == [2, 4, 6]


def test_the_minutes_of_a_run_are_over_even_if_its_callbacks_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = count(step=12)
    monkeypatch.setattr(trainer, "clock_of", lambda *_: [Clock(1.0, now=lambda: float(next(seconds)))])
    fields = {"max_steps": -1, "max_minutes": 1.0, "checkpointing_steps": 100, "lr_scheduler_type": "constant"}
    command = [str(write_tiny(tmp_path, images=(4, 1, 0), **fields))]
    train(load_recipe(command))
    steps = steps_of(tmp_path / "run")
    assert steps > 0
    train(
        load_recipe(
            [*command, "--resume_from_checkpoint", "true", "--restore_callback_states_from_checkpoint", "false"]
        )
    )
    assert steps_of(tmp_path / "run") == steps
    assert "not to be a single sample" not in caplog.text


def test_an_evaluation_at_the_start_is_made_at_the_start_of_the_run_only(tmp_path: Path) -> None:
    command = [str(write_tiny(tmp_path, images=(4, 1, 0), eval_on_start=True, max_steps=2, checkpointing_steps=1))]
    train(load_recipe(command))
    assert evaluations_of(tmp_path / "run") == [0, 1, 2]
    train(load_recipe([*command, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1")]))
    assert evaluations_of(tmp_path / "run") == [0, 1, 2]


def test_a_run_that_was_moved_ends_with_the_model_of_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state has recorded where that was."""
    monkeypatch.chdir(tmp_path)
    fields = {"metric_for_best_model": "eval_mar_100", "greater_is_better": False, "ema_decay": 0.5}
    command = [str(write_tiny(tmp_path, **fields)), "--output_dir"]
    train(load_recipe([*command, "first"]))
    state = json.loads(Path("first/trainer_state.json").read_text())
    assert (state["best_global_step"], state["global_step"]) == (2, 4)
    best = load_file("first/model.safetensors")
    Path("first").rename("second")
    train(load_recipe([*command, "second", "--resume_from_checkpoint", "true"]))
    again, last = load_file("second/model.safetensors"), load_file("second/checkpoint-4/model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in again.items())
    assert any(not torch.equal(tensor, best[name]) for name, tensor in last.items())
    assert read_metrics(Path("second/metrics.json"))["step"] == 2


@pytest.mark.parametrize("limit", ["--early_stopping_patience", "--max_minutes"])
def test_a_run_is_resumed_with_a_limit_that_it_did_not_have(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count(step=12)
    clock = [Clock(1.0, now=lambda: float(next(seconds)))] if limit == "--max_minutes" else []
    recipe = str(write_tiny(tmp_path, images=(4, 1, 0), max_steps=1, checkpointing_steps=1))
    train(load_recipe([recipe]))
    monkeypatch.setattr(trainer, "clock_of", lambda *_: clock)
    length = [] if clock else ["--max_steps", "2"]
    resumed = ["--resume_from_checkpoint", "true", "--allow_changes", "true", limit, "1", *length]
    train(load_recipe([recipe, *resumed]))
    assert steps_of(tmp_path / "run") >= 2
    assert not (tmp_path / "run" / ".resume").exists(), "its links would dangle once the checkpoint is deleted"


def test_a_run_that_does_not_start_deletes_nothing_and_one_that_does_leaves_no_former_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = [str(write_tiny(tmp_path, images=(4, 1, 0), max_steps=1, checkpointing_steps=1))]
    train(load_recipe(recipe))
    model, checkpoint = tmp_path / "run" / "model.safetensors", tmp_path / "run" / "checkpoint-1"
    overwrite = [*recipe, "--overwrite_output_dir", "true", "--learning_rate", "0.1"]
    with pytest.raises(DataError, match="no such file or folder"):
        train(load_recipe([*overwrite, "--dataset_name", str(tmp_path / "datta")]))
    assert model.is_file()
    assert checkpoint.is_dir()

    class Stopped(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            assert not model.exists()
            assert not checkpoint.exists()
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "upload_callbacks", lambda _: [Stopped()])
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(overwrite))


def test_every_checkpoint_holds_model_processor_state_recipe_and_figures(finished_run: Path) -> None:
    for step in (2, 4):
        checkpoint = finished_run / "run" / f"checkpoint-{step}"
        names = {path.name for path in checkpoint.iterdir()}
        assert {"model.safetensors", "config.json", "preprocessor_config.json", "recipe.json", "metrics.json"} <= names
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"} <= names
        assert "training_args.bin" not in names
        figures = read_metrics(checkpoint / "metrics.json")
        assert figures["step"] == step
        assert {f"eval_{key}": value for key, value in read_details(checkpoint)["figures"].items()}.items() <= (
            figures.items()
        )
        wanted = {"eval_map", "eval_map_50", "eval_map_75", "eval_map_small", "eval_map_medium", "eval_map_large"}
        assert wanted | {"eval_box_map", "eval_map_class/circle", "eval_map_class/square"} <= figures.keys()


def test_the_final_folder_is_the_best_checkpoint_with_test_figures_and_a_card(finished_run: Path) -> None:
    run = finished_run / "run"
    state = json.loads((run / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    figures = read_metrics(run / "metrics.json")
    assert figures["eval_map"] == read_metrics(best / "metrics.json")["eval_map"] == state["best_metric"]
    assert "test_map" in figures
    assert read_details(run) == read_details(best)
    assert (run / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert "mask AP" in (run / "README.md").read_text()


def test_predict_draws_every_image_and_writes_results_with_the_files_category_ids(
    finished_run: Path, tmp_path: Path
) -> None:
    out = predict_folder(
        str(finished_run / "run"), [finished_run / "data"], tmp_path / "out", PredictOptions(0.0, recursive=True)
    )
    results = json.loads((out / "predictions.json").read_text())
    used = {row["category_id"] for row in results}
    assert used <= {category["id"] for category in load_model(str(finished_run / "run")).config.categories or []}
    assert len(list(out.glob("*.png"))) == 9
    assert {"image_id", "category_id", "segmentation", "score", "file_name"} <= results[0].keys()
    with pytest.raises(DataError, match="--recursive"):
        predict_folder(str(finished_run / "run"), [finished_run / "data"], tmp_path / "none")


def test_the_predictor_gives_what_the_evaluation_gave(finished_run: Path, tmp_path: Path) -> None:
    evaluate_folder(str(finished_run / "run"), str(finished_run / "data"), output_dir=tmp_path, batch_size=1)
    written = json.loads((tmp_path / "predictions.json").read_text())
    row = load_coco(finished_run / "data")["valid"][0]
    (found,) = Predictor(load_model(str(finished_run / "run")))([open_image(row["image"], "")], threshold=-1)
    theirs = [entry for entry in written if entry["image_id"] == row["image_id"]]
    mine = found.to_coco()
    assert [entry["segmentation"] for entry in mine] == [entry["segmentation"] for entry in theirs]
    assert [entry["score"] for entry in mine] == pytest.approx([entry["score"] for entry in theirs], abs=1e-12)


def test_a_model_holds_the_best_threshold_of_each_class(finished_run: Path) -> None:
    for folder in (finished_run / "run", finished_run / "run" / "checkpoint-4"):
        stored = load_model(str(folder)).config.thresholds
        assert stored == class_thresholds(read_details(folder), [1, 3, 7])
        assert len(stored) == 3


def test_a_stopped_and_resumed_run_ends_with_the_same_weights(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = finished_run / "run" / "checkpoint-2"
    options = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(checkpoint)]
    train(load_recipe([str(finished_run / "recipe.json"), *options]))
    resumed = load_model(str(tmp_path / "again" / "checkpoint-4")).state_dict()
    for name, tensor in load_model(str(finished_run / "run" / "checkpoint-4")).state_dict().items():
        assert torch.equal(resumed[name], tensor), name


def write_start(folder: Path) -> Path:
    """A model for `write_tiny`'s runs, and the backbone that it was built on, in a folder of its own."""
    AutoBackbone.from_config(read_config(TINY["backbone_config"])).save_pretrained(folder / "backbone")
    fields = {"backbone": str(folder / "backbone"), "backbone_config": None}
    recipe = load_recipe([str(write_tiny(folder, **fields))])
    categories = categories_of(load_coco(folder / "data")["train"])
    build_recipe_model(recipe.model, recipe.data, categories).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize(("tune", "option"), [("full", "init_from"), ("frozen", "head_checkpoint")])
def test_a_run_is_resumed_exactly_without_the_models_that_it_began_with(tune: str, option: str, tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    fields = {option: str(start / "model"), "backbone": str(start / "backbone"), "backbone_config": None, "tune": tune}
    train(load_recipe([str(write_tiny(tmp_path, images=(4, 1, 0), **fields))]))
    shutil.rmtree(start)
    half, whole, again = (tmp_path / name for name in ("run/checkpoint-2", "run/checkpoint-4", "again"))
    options = ["--output_dir", str(again), "--resume_from_checkpoint", str(half)]
    train(load_recipe([str(half / "recipe.json"), *options]))
    weights = load_file(again / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(weights[name], one) for name, one in load_file(whole / "model.safetensors").items())
    assert (again / "checkpoint-4" / "config.json").read_text() == (whole / "config.json").read_text()
    assert json.loads((whole / "config.json").read_text())[option] == str(start / "model"), "for the licence chain"


@pytest.mark.parametrize("option", ["init_from", "backbone"])
def test_a_lora_run_that_is_resumed_needs_the_weights_that_its_matrices_are_added_to(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints hold them with the matrices merged in. A path may be relative to where the run began."""
    start = write_start(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    fields = {"backbone": str(start / "backbone"), "backbone_config": None, "tune": "lora", "lora_rank": 2}
    if option == "init_from":
        fields |= {"init_from": "start/model"}
    train(load_recipe([str(write_tiny(tmp_path, images=(4, 1, 0), **fields))]))
    half, whole, again = (tmp_path / name for name in ("run/checkpoint-2", "run/checkpoint-4", "again"))
    command = [str(half / "recipe.json"), "--output_dir", str(again), "--resume_from_checkpoint", str(half)]
    moved = start.rename(tmp_path / "moved")
    for folder in (tmp_path, moved):
        monkeypatch.chdir(folder)
        with pytest.raises(ModelFolderError) as refused:
            train(load_recipe(command))
        message = str(refused.value)
        gone = f"start/model ({start}/model when the run began)" if option == "init_from" else f"{start}/backbone"
        assert message.startswith(f"{half} can't be resumed without {option} {gone}. With tune lora, a checkpoint")
        assert ("give its new place with --init_from" in message) is (option == "init_from")
    if option == "init_from":
        train(load_recipe([*command, "--init_from", str(moved / "model")]))
        weights = load_file(again / "checkpoint-4" / "model.safetensors")
        assert all(torch.equal(weights[name], one) for name, one in load_file(whole / "model.safetensors").items())


def test_a_lora_run_is_resumed_in_another_place_with_a_backbone_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project's folder is moved; the recipe's path is relative to it."""
    project = tmp_path / "project"
    start = write_start(project / "start")
    monkeypatch.chdir(project)
    fields = {"backbone": "start/backbone", "backbone_config": None, "tune": "lora", "lora_rank": 2}
    train(load_recipe([str(write_tiny(project, images=(4, 1, 0), **fields))]))
    whole = load_file(project / "run" / "checkpoint-4" / "model.safetensors")
    monkeypatch.chdir(project.rename(tmp_path / "moved"))
    assert not start.exists()
    half = Path("run/checkpoint-2").resolve()
    moved = ["--dataset_name", "data", "--output_dir", "again", "--resume_from_checkpoint", str(half)]
    train(load_recipe([str(half / "recipe.json"), *moved]))
    weights = load_file("again/checkpoint-4/model.safetensors")
    assert all(torch.equal(weights[name], one) for name, one in whole.items())


def test_a_tiled_model_predicts_in_its_tiles_unless_others_are_given(tiled_run: Path, tmp_path: Path) -> None:
    def found(name: str, **options: Any) -> Any:
        out = predict_folder(
            str(tiled_run / "run"), [tiled_run / "data" / "valid"], tmp_path / name, PredictOptions(0.02, **options)
        )
        return json.loads((out / "predictions.json").read_text())

    own = found("own", batch_size=1)
    assert own
    assert found("same", batch_size=1, tile=48, overlap=0.25) == own
    assert found("other", batch_size=1, tile=64) != own
    assert found("whole", batch_size=1, tile=0) != own
    evaluate_folder(str(tiled_run / "run"), str(tiled_run / "data"), output_dir=tmp_path / "scores", batch_size=1)
    scored = json.loads((tmp_path / "scores" / "predictions.json").read_text())
    masks, theirs = (
        Counter((one["segmentation"]["counts"], one["score"]) for one in results if one["score"] > 0.02)
        for results in (own, scored)
    )
    assert theirs
    assert theirs <= masks, "the 100 best an image"


def test_a_resumed_run_on_tiles_ends_with_the_same_weights(tiled_run: Path, tmp_path: Path) -> None:
    options = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", str(tiled_run / "run" / "checkpoint-2")]
    train(load_recipe([str(tiled_run / "recipe.json"), *options]))
    resumed = load_model(str(tmp_path / "checkpoint-4")).state_dict()
    for name, tensor in load_model(str(tiled_run / "run" / "checkpoint-4")).state_dict().items():
        assert torch.equal(resumed[name], tensor), name


def test_a_run_with_repeated_samples_and_class_weights_resumes_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"repeat_factor_threshold": 0.9, "class_weights": "balanced", "max_steps": 6, "checkpointing_steps": 2}
    recipe = str(write_tiny(tmp_path, images=(7, 2, 0), **fields))
    train(load_recipe([recipe]))
    (repeated,) = (line for line in caplog.messages if line.startswith("repeat_factor_threshold"))
    assert "9 samples per epoch instead of 7; 3 of 3 classes are repeated: circle 1.3 times (in 4 of 7)" in repeated
    (weighted,) = (line for line in caplog.messages if line.startswith("class_weights"))
    whole = load_model(str(tmp_path / "run" / "checkpoint-6"))
    saved = load_recipe([str(tmp_path / "run" / "checkpoint-6" / "recipe.json")]).model.class_weights
    assert isinstance(saved, dict)
    assert whole.config.class_weights == list(saved.values())
    assert all(f"{name} {weight:g} (" in weighted for name, weight in saved.items())
    options = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint"]
    train(load_recipe([recipe, *options, str(tmp_path / "run" / "checkpoint-2")]))
    resumed = load_model(str(tmp_path / "again" / "checkpoint-6")).state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed[name], tensor), name
    options += [str(tmp_path / "run" / "checkpoint-4"), "--class_weights", json.dumps({**saved, "circle": 9})]
    with pytest.raises(CheckpointError, match=r"was trained with other settings: class_weights was .*circle"):
        train(load_recipe([recipe, *options[:1], str(tmp_path / "other"), *options[2:]]))


def test_a_lora_run_leaves_a_plain_model_and_an_adapter(tmp_path: Path) -> None:
    backbone = AutoBackbone.from_config(read_config(TINY["backbone_config"]))
    backbone.save_pretrained(tmp_path / "backbone")
    options = {"backbone": str(tmp_path / "backbone"), "backbone_config": None}
    recipe = write_tiny(tmp_path, tune="lora", lora_rank=2, max_steps=2, **options)
    train(load_recipe([str(recipe)]))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    figures = evaluate_folder(str(tmp_path / "run"), str(tmp_path / "data"), batch_size=1)
    held = read_metrics(tmp_path / "run" / "metrics.json")
    assert figures["eval_mar_100"] == pytest.approx(held["eval_mar_100"], abs=1e-6)


def test_a_lora_run_on_random_weights_leaves_no_adapter_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(load_recipe([str(write_tiny(tmp_path, tune="lora", lora_rank=2, max_steps=1))]))
    assert "adapter is not written: an adapter needs a published backbone" in caplog.text
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "adapter").exists()


PIPELINE = """
import sys
from transformers import pipeline
segment = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True, device="cpu")
found = segment(sys.argv[2], subtask="instance", threshold=0.0)
assert not any(name.startswith("m2f_trainer") for name in sys.modules)
assert all({"label", "mask", "score"} <= set(part) for part in found)
print("parts", len(found), {part["mask"].size for part in found})
"""


def test_the_folder_works_in_transformers_pipeline_without_the_package(finished_run: Path, tmp_path: Path) -> None:
    picture = sorted((finished_run / "data" / "test").glob("*.jpg"))[0]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PIPELINE, str(finished_run / "run"), str(picture)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parts" in done.stdout


def test_a_dataset_without_a_valid_split_is_refused_before_training(tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path)
    shutil.rmtree(tmp_path / "data" / "valid")
    done = m2f("train", recipe)
    assert done.returncode == 1
    assert "valid" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_saved_head_starts_a_run_on_another_backbone_of_the_same_width(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = tmp_path / "head"
    train(load_recipe([str(write_tiny(tmp_path / "first", save_head=str(head), max_steps=1, checkpointing_steps=1))]))
    assert not any(".backbone." in name for name in load_file(head / "head.safetensors"))
    load_recipe([str(tmp_path / "first" / "recipe.json"), "--resume_from_checkpoint", "true"])  # it is its own head
    with pytest.raises(RecipeError, match="this folder holds a model already"):
        load_recipe([str(write_tiny(tmp_path / "second", save_head=str(head)))])
    backbone = {**TINY["backbone_config"], "num_hidden_layers": 3}
    second = write_tiny(
        tmp_path / "second", backbone_config=backbone, pyramid_taps=[1, 3], head_checkpoint=str(head), max_steps=1,
        checkpointing_steps=1,
    )  # fmt: skip
    train(load_recipe([str(second)]))
    assert "0 new; 0 unused; classes kept: circle, square, triangle" in caplog.text
