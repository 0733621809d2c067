"""A run from recipe to model card, and everything that can be done with what it leaves."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.images import open_image
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import DataError, RecipeError
from m2f_trainer.inference.predict import PredictOptions, predict_folder
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.run_folder import read_details, read_metrics
from m2f_trainer.training.evaluate import evaluate_folder
from m2f_trainer.training.run import train
from tests.training.runs import m2f, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("whole")
    train(load_recipe([str(write_tiny(folder))]))
    return folder


def test_a_best_figure_that_no_evaluation_has_is_refused_before_the_model_is_made(tmp_path: Path) -> None:
    recipe = str(write_tiny(tmp_path, backbone_config=None, metric_for_best_model="map50"))
    with pytest.raises(
        RecipeError, match=r"metric_for_best_model=map50: no such figure; the nearest is eval_map_50. The"
    ):
        train(load_recipe([recipe, "--image_height", "64", "--image_width", "64"]))


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


def test_every_checkpoint_holds_model_processor_state_recipe_and_figures(folder: Path) -> None:
    for step in (2, 4):
        checkpoint = folder / "run" / f"checkpoint-{step}"
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


def test_the_final_folder_is_the_best_checkpoint_with_test_figures_and_a_card(folder: Path) -> None:
    run = folder / "run"
    state = json.loads((run / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    figures = read_metrics(run / "metrics.json")
    assert figures["eval_map"] == read_metrics(best / "metrics.json")["eval_map"] == state["best_metric"]
    assert "test_map" in figures
    assert read_details(run) == read_details(best)
    assert (run / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert "mask AP" in (run / "README.md").read_text()


@pytest.mark.parametrize("where", ["checkpoint-2", "checkpoint-4"])
def test_evaluating_a_checkpoint_again_gives_the_figures_it_holds(folder: Path, tmp_path: Path, where: str) -> None:
    checkpoint = folder / "run" / where
    again = evaluate_folder(str(checkpoint), str(folder / "data"), output_dir=tmp_path, batch_size=1)
    held = {key: value for key, value in read_metrics(checkpoint / "metrics.json").items() if "map" in key}
    assert held
    for key, value in held.items():
        assert again[key] == pytest.approx(value, abs=1e-9), key
    assert read_metrics(tmp_path / "metrics.json")["eval_map"] == again["eval_map"]
    assert read_details(tmp_path)["errors"] == read_details(checkpoint)["errors"]
    assert (tmp_path / "classes.csv").read_text().startswith("id,name,ap,")


def test_test_figures_are_of_the_test_split(folder: Path) -> None:
    again = evaluate_folder(str(folder / "run"), str(folder / "data"), "test", batch_size=1)
    held = read_metrics(folder / "run" / "metrics.json")
    assert held["test_mar_100"] == pytest.approx(again["eval_mar_100"], abs=1e-9)
    assert held["test_box_mar_100"] == pytest.approx(again["eval_box_mar_100"], abs=1e-9)


def test_the_figures_of_a_run_are_not_replaced_by_those_of_another_split(folder: Path) -> None:
    held = (folder / "run" / "metrics.json").read_bytes()
    with pytest.raises(RecipeError, match="holds a run"):
        evaluate_folder(str(folder / "run"), str(folder / "data"), "test", output_dir=folder / "run")
    assert (folder / "run" / "metrics.json").read_bytes() == held


def test_written_predictions_score_what_pycocotools_says(folder: Path, tmp_path: Path) -> None:
    figures = evaluate_folder(str(folder / "run"), str(folder / "data"), output_dir=tmp_path, batch_size=1)
    truth = COCO(str(folder / "data" / "valid" / "_annotations.coco.json"))
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert results
    scorer = COCOeval(truth, truth.loadRes(results), "segm")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert figures["eval_map"] == pytest.approx(scorer.stats[0], abs=1e-9)
    assert figures["eval_mar_100"] == pytest.approx(scorer.stats[8], abs=1e-9)


def test_predict_draws_every_image_and_writes_results_with_the_files_category_ids(folder: Path, tmp_path: Path) -> None:
    out = predict_folder(str(folder / "run"), [folder / "data"], tmp_path / "out", PredictOptions(0.0, recursive=True))
    results = json.loads((out / "predictions.json").read_text())
    used = {row["category_id"] for row in results}
    assert used <= {category["id"] for category in load_model(str(folder / "run")).config.categories or []}
    assert len(list(out.glob("*.png"))) == 9
    assert {"image_id", "category_id", "segmentation", "score", "file_name"} <= results[0].keys()
    with pytest.raises(DataError, match="--recursive"):
        predict_folder(str(folder / "run"), [folder / "data"], tmp_path / "none")


def test_the_predictor_gives_what_the_evaluation_gave(folder: Path, tmp_path: Path) -> None:
    evaluate_folder(str(folder / "run"), str(folder / "data"), output_dir=tmp_path, batch_size=1)
    written = json.loads((tmp_path / "predictions.json").read_text())
    row = load_coco(folder / "data")["valid"][0]
    (found,) = Predictor(load_model(str(folder / "run")))([open_image(row["image"], "")], threshold=-1)
    theirs = [entry for entry in written if entry["image_id"] == row["image_id"]]
    mine = found.to_coco()
    assert [entry["segmentation"] for entry in mine] == [entry["segmentation"] for entry in theirs]
    assert [entry["score"] for entry in mine] == pytest.approx([entry["score"] for entry in theirs], abs=1e-12)


def test_a_stopped_and_resumed_run_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "run" / "checkpoint-2"
    options = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(checkpoint)]
    train(load_recipe([str(folder / "recipe.json"), *options]))
    resumed = load_model(str(tmp_path / "again" / "checkpoint-4")).state_dict()
    for name, tensor in load_model(str(folder / "run" / "checkpoint-4")).state_dict().items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_ranks_score_what_one_process_scores(folder: Path, tmp_path: Path, launcher: str) -> None:
    done = m2f("evaluate", folder / "run", folder / "data", "--output_dir", tmp_path, "--batch_size", 1,
               ranks=2, launcher=launcher)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = evaluate_folder(str(folder / "run"), str(folder / "data"), batch_size=1)
    two = read_metrics(tmp_path / "metrics.json")
    for key in (key for key in one if "map" in key or "mar" in key):
        assert two[key] == pytest.approx(one[key], abs=1e-12), key


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps on tiles."""
    folder = tmp_path_factory.mktemp("tiled")
    fields = {"tile_size": 48, "tile_overlap": 0.25, "augmentation": "light", "copy_paste": 0.5}
    train(load_recipe([str(write_tiny(folder, **fields))]))
    return folder


def test_a_tiled_model_evaluated_again_gives_the_figures_that_training_printed(tiled: Path, tmp_path: Path) -> None:
    checkpoint = tiled / "run" / "checkpoint-4"
    config = load_model(str(checkpoint)).config
    assert (config.tile_size, config.tile_overlap, config.image_height) == (48, 0.25, 64)
    again = evaluate_folder(str(checkpoint), str(tiled / "data"), output_dir=tmp_path, batch_size=1)
    held = {key: value for key, value in read_metrics(checkpoint / "metrics.json").items() if "ma" in key}
    assert held
    for key, value in held.items():
        assert again[key] == pytest.approx(value, abs=1e-9), key
    assert json.loads((tmp_path / "predictions.json").read_text())
    for part in ("errors", "calibration", "images"):
        assert read_details(tmp_path)[part] == read_details(checkpoint)[part]


def test_a_tiled_models_figures_are_pycocotools_own_at_the_images_size(tiled: Path, tmp_path: Path) -> None:
    figures = evaluate_folder(str(tiled / "run"), str(tiled / "data"), output_dir=tmp_path, batch_size=5)
    truth = COCO(str(tiled / "data" / "valid" / "_annotations.coco.json"))
    results = json.loads((tmp_path / "predictions.json").read_text())
    scorer = COCOeval(truth, truth.loadRes(results), "segm")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert figures["eval_map"] == pytest.approx(scorer.stats[0], abs=1e-9)
    assert figures["eval_mar_100"] == pytest.approx(scorer.stats[8], abs=1e-9)
    assert max(Counter(result["image_id"] for result in results).values()) <= 100


def test_a_tiled_model_predicts_in_tiles_unless_it_is_told_otherwise(tiled: Path, tmp_path: Path) -> None:
    def found(name: str, **options: Any) -> Any:
        out = predict_folder(
            str(tiled / "run"), [tiled / "data" / "valid"], tmp_path / name, PredictOptions(0.02, **options)
        )
        return json.loads((out / "predictions.json").read_text())

    own = found("own", batch_size=1)
    assert own
    assert found("same", batch_size=1, tile=48, overlap=0.25) == own
    assert found("other", batch_size=1, tile=64) != own
    assert found("whole", batch_size=1, tile=0) != own
    evaluate_folder(str(tiled / "run"), str(tiled / "data"), output_dir=tmp_path / "scores", batch_size=1)
    scored = json.loads((tmp_path / "scores" / "predictions.json").read_text())
    masks, theirs = (
        Counter((one["segmentation"]["counts"], one["score"]) for one in results if one["score"] > 0.02)
        for results in (own, scored)
    )
    assert theirs
    assert theirs <= masks, "the 100 best an image"


def test_two_ranks_score_a_tiled_model_as_one_does(tiled: Path, tmp_path: Path) -> None:
    done = m2f("evaluate", tiled / "run", tiled / "data", "--output_dir", tmp_path, "--batch_size", 1, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one = evaluate_folder(str(tiled / "run"), str(tiled / "data"), batch_size=1)
    two = read_metrics(tmp_path / "metrics.json")
    for key in (key for key in one if "map" in key or "mar" in key):
        assert two[key] == pytest.approx(one[key], abs=1e-12), key


def test_a_resumed_run_on_tiles_ends_with_the_same_weights(tiled: Path, tmp_path: Path) -> None:
    options = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", str(tiled / "run" / "checkpoint-2")]
    train(load_recipe([str(tiled / "recipe.json"), *options]))
    resumed = load_model(str(tmp_path / "checkpoint-4")).state_dict()
    for name, tensor in load_model(str(tiled / "run" / "checkpoint-4")).state_dict().items():
        assert torch.equal(resumed[name], tensor), name


def test_a_lora_run_leaves_a_plain_model_and_an_adapter(tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path, tune="lora", lora_rank=2, max_steps=2)
    train(load_recipe([str(recipe)]))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    figures = evaluate_folder(str(tmp_path / "run"), str(tmp_path / "data"), batch_size=1)
    held = read_metrics(tmp_path / "run" / "metrics.json")
    assert figures["eval_mar_100"] == pytest.approx(held["eval_mar_100"], abs=1e-6)


PIPELINE = """
import sys
from transformers import pipeline
segment = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True, device="cpu")
found = segment(sys.argv[2], subtask="instance", threshold=0.0)
assert not any(name.startswith("m2f_trainer") for name in sys.modules)
assert all({"label", "mask", "score"} <= set(part) for part in found)
print("parts", len(found), {part["mask"].size for part in found})
"""


def test_the_folder_works_in_transformers_pipeline_without_the_package(folder: Path, tmp_path: Path) -> None:
    picture = sorted((folder / "data" / "test").glob("*.jpg"))[0]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PIPELINE, str(folder / "run"), str(picture)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parts" in done.stdout


def test_a_dataset_without_a_valid_split_is_refused_before_training(tmp_path: Path) -> None:
    import shutil

    recipe = write_tiny(tmp_path)
    shutil.rmtree(tmp_path / "data" / "valid")
    done = m2f("train", recipe)
    assert done.returncode == 1
    assert "valid" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_is_not_scored_on_classes_of_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_sample(tmp_path / "set", images=(2, 2, 0))
    named = next(iter(categories_of(load_coco(root)["valid"])))
    config = SimpleNamespace(categories=[{"id": named.id, "name": "another"}])
    monkeypatch.setattr("m2f_trainer.training.evaluate.load_model", lambda _: SimpleNamespace(config=config))
    with pytest.raises(DataError, match=f"category {named.id} is 'another' in the model and '{named.name}'"):
        evaluate_folder("a model", str(root))
