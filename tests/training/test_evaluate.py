"""A saved model evaluated again gives the metrics of training, equal to pycocotools', on any number of ranks."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import DataError, RecipeError
from m2f_trainer.evaluation.report import write_report
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Precision
from m2f_trainer.model.mask2former import M2FModel, load_model
from m2f_trainer.run_folder import read_details, read_json, read_metrics
from m2f_trainer.training.evaluate import evaluate_folder, evaluates_in_bf16, write_predictions
from m2f_trainer.training.run import train
from tests.model.tiny import tiny_model
from tests.training.runs import m2f, write_tiny


@pytest.mark.parametrize("where", ["checkpoint-2", "checkpoint-4"])
def test_evaluating_a_checkpoint_again_gives_the_figures_it_holds(
    finished_run: Path, tmp_path: Path, where: str
) -> None:
    checkpoint = finished_run / "run" / where
    again = evaluate_folder(str(checkpoint), str(finished_run / "data"), output_dir=tmp_path, batch_size=1)
    held = {key: value for key, value in read_metrics(checkpoint / "metrics.json").items() if "map" in key}
    assert held
    for key, value in held.items():
        assert again[key] == pytest.approx(value, abs=1e-9), key
    assert read_metrics(tmp_path / "metrics.json")["eval_map"] == again["eval_map"]
    assert read_details(tmp_path)["errors"] == read_details(checkpoint)["errors"]
    assert (tmp_path / "classes.csv").read_text().startswith("id,name,ap,")


def test_evaluation_json_holds_what_was_evaluated(finished_run: Path, tmp_path: Path) -> None:
    model, data = str(finished_run / "run"), str(finished_run / "data")
    evaluate_folder(model, data, "test", output_dir=tmp_path, batch_size=1)
    details = read_details(tmp_path)
    assert details["evaluated"] == {"model": model, "dataset": data, "split": "test"}
    assert len(details["images"]) == len(load_coco(data)["test"])
    page = write_report([finished_run / "run", tmp_path], tmp_path / "page.html").read_text()
    assert "<td>test</td>" in page
    assert "<td>valid</td>" in page


def test_the_worst_and_the_best_images_of_an_evaluation_are_in_its_folder_and_its_report(
    finished_run: Path, tmp_path: Path
) -> None:
    evaluate_folder(str(finished_run / "run"), str(finished_run / "data"), "test", output_dir=tmp_path, batch_size=1)
    drawn = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    shown = read_details(tmp_path)["shown"]
    assert drawn == [f"{kind}_{k}.jpg" for kind in ("best", "worst") for k in range(1, len(shown[kind]) + 1)]
    rows = {row["image_id"]: row for row in load_coco(finished_run / "data")["test"]}
    row = rows[shown["worst"][0]["image_id"]]
    with Image.open(tmp_path / "pictures" / "worst_1.jpg") as picture:
        assert picture.width >= 2 * row["width"]  # ground truth beside prediction
    for load_images in (False, True):
        page = write_report([tmp_path], tmp_path / "page.html", load_images).read_text()
        assert page.count("data:image/jpeg") + page.count("data:image/webp") == len(drawn)


def test_test_figures_are_of_the_test_split(finished_run: Path) -> None:
    again = evaluate_folder(str(finished_run / "run"), str(finished_run / "data"), "test", batch_size=1)
    held = read_metrics(finished_run / "run" / "metrics.json")
    assert held["test_mar_100"] == pytest.approx(again["eval_mar_100"], abs=1e-9)
    assert held["test_box_mar_100"] == pytest.approx(again["eval_box_mar_100"], abs=1e-9)


def test_a_test_split_that_was_left_out_is_refused_with_the_reason(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "data", tmp_path / "data")
    path = tmp_path / "data/test/_annotations.coco.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": [], "annotations": []}))
    with pytest.raises(DataError, match=r"test/_annotations\.coco\.json: `images` is empty"):
        evaluate_folder(str(finished_run / "run"), str(tmp_path / "data"), "test")


def test_the_figures_of_a_run_are_not_replaced_by_those_of_another_split(finished_run: Path) -> None:
    held = (finished_run / "run" / "metrics.json").read_bytes()
    with pytest.raises(RecipeError, match="holds a run"):
        evaluate_folder(str(finished_run / "run"), str(finished_run / "data"), "test", output_dir=finished_run / "run")
    assert (finished_run / "run" / "metrics.json").read_bytes() == held


def assert_pycocotools_figures(
    figures: Mapping[str, float], data: Path, results: list[dict[str, Any]], split: str = "valid"
) -> None:
    """AP and AR of a dataset's split are those of pycocotools for these results."""
    truth = COCO(str(data / split / "_annotations.coco.json"))
    scorer = COCOeval(truth, truth.loadRes(results), "segm")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert figures["eval_map"] == pytest.approx(scorer.stats[0], abs=1e-9)
    assert figures["eval_mar_100"] == pytest.approx(scorer.stats[8], abs=1e-9)


def test_written_predictions_score_what_pycocotools_says(finished_run: Path, tmp_path: Path) -> None:
    figures = evaluate_folder(str(finished_run / "run"), str(finished_run / "data"), output_dir=tmp_path, batch_size=1)
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert results
    assert_pycocotools_figures(figures, finished_run / "data", results)


def test_all_images_of_a_dataset_with_one_split_are_scored(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, data = str(finished_run / "run"), write_sample(tmp_path / "other", seed=1, images=(6, 0, 0))
    file = data / "train" / "_annotations.coco.json"
    figures = evaluate_folder(model, str(file), output_dir=tmp_path / "scores", batch_size=1)
    results = json.loads((tmp_path / "scores" / "predictions.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3, 4, 5, 6}
    assert capsys.readouterr().out == "6 image(s) of split 'train'\n"
    assert "has no record of a training on" in caplog.text
    assert "so all 6 images are scored" in caplog.text
    assert_pycocotools_figures(figures, data, results, "train")
    capsys.readouterr()
    for split, images in (("train", 5), ("valid", 1)):
        evaluate_folder(model, str(file), split, batch_size=1)
        assert capsys.readouterr().out == f"{images} image(s) of split '{split}'\n"
    evaluate_folder(model, str(write_sample(tmp_path / "last", images=(0, 0, 2))), batch_size=1)
    assert capsys.readouterr().out == "2 image(s) of split 'test'\n"


def test_a_model_is_scored_on_the_images_that_were_held_out_of_its_own_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_recipe([str(write_tiny(tmp_path, images=(10, 0, 0), max_steps=1, max_train_samples=3))]))
    held = read_metrics(tmp_path / "run" / "metrics.json")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    for data in ("data", "moved"):
        capsys.readouterr()
        again = evaluate_folder(str(tmp_path / "run"), str(tmp_path / data), batch_size=1)
        assert capsys.readouterr().out == "2 image(s) of split 'valid'\n"
        assert again["eval_mar_100"] == pytest.approx(held["eval_mar_100"], abs=1e-9)


def test_a_model_that_was_trained_on_all_images_of_a_dataset_is_said_to_be(
    finished_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run / "data" / "train", tmp_path / "alone" / "train")
    images = len(load_coco(finished_run / "data")["train"])
    evaluate_folder(str(finished_run / "run"), str(tmp_path / "alone"), batch_size=1)
    assert capsys.readouterr().out == f"{images} image(s) of split 'train'\n"
    assert f"was trained on all {images} images of" in caplog.text
    assert "no record" not in caplog.text


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_ranks_score_what_one_process_scores(finished_run: Path, tmp_path: Path, launcher: str) -> None:
    done = m2f("evaluate", finished_run / "run", finished_run / "data", "--output_dir", tmp_path, "--batch_size", 1,
               ranks=2, launcher=launcher)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = evaluate_folder(str(finished_run / "run"), str(finished_run / "data"), batch_size=1)
    two = read_metrics(tmp_path / "metrics.json")
    for key in (key for key in one if "map" in key or "mar" in key):
        assert two[key] == pytest.approx(one[key], abs=1e-12), key


def test_a_tiled_model_evaluated_again_gives_the_figures_that_training_printed(tiled_run: Path, tmp_path: Path) -> None:
    checkpoint = tiled_run / "run" / "checkpoint-4"
    config = load_model(str(checkpoint)).config
    assert (config.tile_size, config.tile_overlap, config.image_height) == (48, 0.25, 64)
    again = evaluate_folder(str(checkpoint), str(tiled_run / "data"), output_dir=tmp_path, batch_size=1)
    held = {key: value for key, value in read_metrics(checkpoint / "metrics.json").items() if "ma" in key}
    assert held
    for key, value in held.items():
        assert again[key] == pytest.approx(value, abs=1e-9), key
    assert json.loads((tmp_path / "predictions.json").read_text())
    for part in ("errors", "calibration", "images"):
        assert read_details(tmp_path)[part] == read_details(checkpoint)[part]


def test_a_tiled_models_figures_are_pycocotools_own_at_the_images_size(tiled_run: Path, tmp_path: Path) -> None:
    figures = evaluate_folder(str(tiled_run / "run"), str(tiled_run / "data"), output_dir=tmp_path, batch_size=5)
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert_pycocotools_figures(figures, tiled_run / "data", results)
    assert max(Counter(result["image_id"] for result in results).values()) <= 100


def test_predictions_have_the_ids_of_the_dataset_whose_classes_are_matched_by_name(
    tiled_run: Path, tmp_path: Path
) -> None:
    """The dataset numbers the model's classes otherwise."""
    shutil.copytree(tiled_run / "data", tmp_path / "data")
    path = tmp_path / "data/valid/_annotations.coco.json"
    content = json.loads(path.read_text())
    first, *others = ids = [one["id"] for one in content["categories"]]
    new = dict(zip(ids, [max(ids) + 1, first, *others[1:]], strict=True))
    content["categories"] = [{**one, "id": new[one["id"]]} for one in content["categories"]]
    content["annotations"] = [{**one, "category_id": new[one["category_id"]]} for one in content["annotations"]]
    path.write_text(json.dumps(content))
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "data" / split)
    figures = evaluate_folder(str(tiled_run / "run"), str(tmp_path / "data"), "valid", tmp_path / "scores")
    results = json.loads((tmp_path / "scores/predictions.json").read_text())
    assert_pycocotools_figures(figures, tmp_path / "data", results)
    assert {one["category_id"] for one in results} <= set(new.values())


def test_predictions_of_a_class_that_the_dataset_lacks_never_get_the_id_of_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The dataset has the model's class 2 as class 1, and lacks the model's classes 1 and 7."""
    ids, size = np.array([1, 2, 7]), {"size": [4, 4], "counts": b"04<"}
    found = Instances(5, ids, np.full(3, 0.5), [size] * 3, np.zeros((3, 4)), (4, 4))
    write_predictions([found], {1: 2}, tmp_path / "predictions.json")
    assert [one["category_id"] for one in json.loads((tmp_path / "predictions.json").read_text())] == [1, 7]
    assert "1 prediction(s) of classes that the dataset lacks are left out" in caplog.text


def test_two_ranks_score_a_tiled_model_as_one_does(tiled_run: Path, tmp_path: Path) -> None:
    done = m2f("evaluate", tiled_run / "run", tiled_run / "data", "--output_dir", tmp_path, "--batch_size", 1, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one = evaluate_folder(str(tiled_run / "run"), str(tiled_run / "data"), batch_size=1)
    two = read_metrics(tmp_path / "metrics.json")
    for key in (key for key in one if "map" in key or "mar" in key):
        assert two[key] == pytest.approx(one[key], abs=1e-12), key


def test_a_model_is_not_scored_on_classes_of_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_sample(tmp_path / "set", images=(2, 2, 0))
    named = next(iter(categories_of(load_coco(root)["valid"])))
    config = SimpleNamespace(categories=[{"id": named.id, "name": "another"}], pixel_range=None)
    monkeypatch.setattr("m2f_trainer.training.evaluate.load_model", lambda _: SimpleNamespace(config=config))
    with pytest.raises(DataError, match=f"category {named.id} is 'another' in the model and '{named.name}'"):
        evaluate_folder("user/model", str(root))


@pytest.mark.parametrize("tile_size", [None, 48])
def test_objects_of_a_class_that_the_model_lacks_are_scored_as_missed(tmp_path: Path, tile_size: int | None) -> None:
    data = write_sample(tmp_path / "data", images=(1, 3, 0))
    rows = load_coco(data)["valid"]
    *known, unknown = categories_of(rows)
    assert any(one["category_id"] == unknown.id for row in rows for one in row["objects"])
    model = tiny_model(categories=[vars(one) for one in known], tile_size=tile_size)
    model.save_pretrained(tmp_path / "model")
    figures = evaluate_folder(str(tmp_path / "model"), str(data), output_dir=tmp_path / "scores", batch_size=2)
    assert_pycocotools_figures(figures, data, json.loads((tmp_path / "scores" / "predictions.json").read_text()))
    missed = {row["id"]: row["kept"] for row in read_details(tmp_path / "scores")["classes"] if row["objects"]}
    assert missed[unknown.id] == 0


@pytest.mark.slow
def test_bfloat16_changes_ap_by_less_than_a_tenth_of_a_point(tmp_path: Path) -> None:
    """On 240 images, with a model that finds most objects; a point is a hundredth."""
    data = write_sample(tmp_path / "data")
    options = ["quickstart", "--dataset_name", str(data), "--output_dir", str(tmp_path / "run"), "--max_steps", "150"]
    assert m2f("train", *options, "--use_cpu", "true").returncode == 0
    model = str(tmp_path / "run")
    exact, half = (
        evaluate_folder(model, str(data), "train", precision=precision)["eval_map"] for precision in ("float32", "bf16")
    )
    assert exact > 0.4
    assert half != exact
    assert half == pytest.approx(exact, abs=0.001)


@pytest.mark.parametrize(
    ("recipe", "precision", "expected"),
    [
        ({}, "auto", False),
        ({"bf16": True, "use_cpu": True}, "auto", True),
        ({"bf16": False, "use_cpu": True}, "auto", False),
        ({"bf16": True, "use_cpu": False}, "auto", False),
        ({"bf16": True, "use_cpu": True}, "float32", False),
        ({"bf16": False, "use_cpu": True}, "bf16", True),
    ],
)
def test_the_precision_is_that_of_a_training_on_the_same_device(
    recipe: dict[str, bool], precision: Precision, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's bfloat16 is not used on a CPU, where it may be emulated."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert evaluates_in_bf16(str(tmp_path), precision) is expected


def test_a_model_is_evaluated_in_batches_as_in_its_training(
    tiled_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes, forward = tmp_path / "model", [], M2FModel.forward
    shutil.copytree(tiled_run / "run", model)

    def counted(self: M2FModel, pixel_values: Tensor, *rest: Any, **named: Any) -> Any:
        sizes.append(len(pixel_values))
        return forward(self, pixel_values, *rest, **named)

    monkeypatch.setattr(M2FModel, "forward", counted)
    recipe = read_json(model / "recipe.json")
    for own, given, expected in (({"per_device_eval_batch_size": 3}, None, 3), ({}, None, 4), ({}, 2, 2)):
        fields = {name: value for name, value in recipe.items() if name != "per_device_eval_batch_size"}
        (model / "recipe.json").write_text(json.dumps({**fields, **own}))
        sizes.clear()
        evaluate_folder(str(model), str(tiled_run / "data"), batch_size=given)
        assert max(sizes) == expected


@pytest.mark.parametrize(("hardware", "expected"), [("CPU Xeon", True), ("NVIDIA H100", False)])
def test_a_training_used_the_cpu_where_its_state_names_one(
    hardware: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe doesn't say so where there was no accelerator."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "recipe.json").write_text(json.dumps({"bf16": True, "use_cpu": False}))
    state = {"stateful_callbacks": {"Cost": {"args": {}, "attributes": {"hardware": hardware}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert evaluates_in_bf16(str(tmp_path), "auto") is expected
