"""The parts of a run that are built from recipe values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, Mask2FormerConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from m2f_trainer.cli import main as cli
from m2f_trainer.config.arguments import HEADS, DataArguments, ModelArguments
from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import Category, load_coco
from m2f_trainer.errors import DataError, RecipeError
from m2f_trainer.export.export import export_constants
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.model.backbones import taps_of
from m2f_trainer.model.mask2former import backbone_of
from m2f_trainer.training.auto import with_pixel_range
from m2f_trainer.training.prepare import (
    augmentation_seed,
    build_recipe_model,
    eval_samples,
    head_settings,
    image_processor,
    load_data,
    report_overfull,
    require_batch,
    require_figure,
    train_samples,
)
from tests.data.test_reading import deep_dataset, ramp
from tests.model.tiny import CATEGORIES, DINOV2, VIT, tiny_model
from tests.training.runs import write_dense, write_tiny


def test_augmentation_is_seeded_with_data_seed_which_may_be_zero_or_else_seed() -> None:
    given = ["--dataset_name", "coco", "--seed", "5"]
    assert augmentation_seed(load_recipe([*given, "--data_seed", "0"]).train) == 0
    assert augmentation_seed(load_recipe(given).train) == 5


def test_the_data_of_a_run_are_its_splits_cut_to_the_recipes_limits(tmp_path: Path) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path)), "--max_train_samples", "2", "--max_eval_samples", "1"])
    data = load_data(recipe.data)
    assert data.test is not None
    assert [len(split) for split in (data.train, data.valid, data.test)] == [2, 1, 1]
    for samples in (
        train_samples(data.train, recipe.data, 0, data.categories),
        eval_samples(
            data.valid, build_recipe_model(recipe.model, recipe.data, data.categories).config, data.categories
        ),
    ):
        assert samples[0]["pixel_values"].shape == (3, 64, 64)


def test_a_dataset_without_a_test_split_has_no_test_rows(tmp_path: Path) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path, images=(3, 2, 0)))])
    assert load_data(recipe.data).test is None


def test_images_with_more_objects_than_queries_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path))])
    data = load_data(recipe.data)
    samples = train_samples(data.train, recipe.data, 0, data.categories)
    counts = [sum(not one["iscrowd"] for one in row["objects"]) for row in data.train]
    assert samples.objects().tolist() == counts
    caplog.clear()
    report_overfull(samples, max(counts))
    assert not caplog.records
    report_overfull(samples, max(counts) - 1)
    (message,) = caplog.messages
    assert message.startswith(f"{counts.count(max(counts))} of {len(counts)} training samples hold more objects than")
    assert f"(sample {counts.index(max(counts))})" in message


def without_objects_in_the_first_image(recipe: Path, split: str = "train") -> None:
    """Delete the objects of the first image of a split of `write_tiny`'s dataset."""
    file = recipe.parent / "data" / split / "_annotations.coco.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    first = min(image["id"] for image in content["images"])
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != first]
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("command", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--tile_size", "64"],
        ["--tile_size", "64", "--repeat_factor_threshold", "0.5", "--num_queries", "auto"],
        ["--class_weights", "balanced"],
    ],
)
def test_training_images_without_objects_are_refused_before_training(
    options: list[str], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_tiny(tmp_path)
    without_objects_in_the_first_image(recipe)
    assert cli.main(["train", str(recipe), "--max_train_samples", "1", *options, *command]) == 1
    assert (
        "split 'train': expected objects to train on, found only crowd regions or none in its first 1 image(s). Raise "
        "max_train_samples, or annotate objects in them." in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_validation_images_without_objects_are_refused_before_training(tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path)
    without_objects_in_the_first_image(recipe, "valid")
    assert len(load_data(load_recipe([str(recipe)]).data).valid) == 3
    with pytest.raises(DataError, match=r"or none in its first 1 image\(s\). Raise max_eval_samples"):
        load_data(load_recipe([str(recipe), "--max_eval_samples", "1"]).data)


@pytest.mark.parametrize("command", [[], ["--dry_run"]])
def test_fewer_samples_than_one_batch_that_would_be_dropped_are_refused_before_training(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_tiny(tmp_path, images=(4, 1, 0), dataloader_drop_last=True, per_device_train_batch_size=5)
    assert cli.main(["train", str(recipe), *command]) == 1
    assert (
        "dataloader_drop_last: expected at least one whole batch of 5 training samples, got 4 samples, so that no step "
        "would be made. Lower per_device_train_batch_size (now 5), or set dataloader_drop_last false."
        in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_the_batch_that_would_be_dropped_is_that_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--dataloader_drop_last", "true", "--per_device_train_batch_size"]
    recipe = str(write_tiny(tmp_path, images=(4, 1, 0)))
    data = load_data(load_recipe([recipe]).data)
    samples = train_samples(data.train, load_recipe([recipe]).data, 0, data.categories)
    require_batch(samples, load_recipe([recipe, *options, "4"]).train)
    require_batch(samples, load_recipe([recipe, "--per_device_train_batch_size", "5"]).train)
    train = load_recipe([recipe, *options, "3"]).train
    require_batch(samples, train)
    monkeypatch.setattr(type(train), "world_size", 2)
    with pytest.raises(RecipeError, match=r"batch of 6 training samples, got 4 .*Lower .* \(now 3 on each of 2 proc"):
        require_batch(samples, train)


@pytest.mark.parametrize("tile_size", [None, 32])
def test_the_range_of_16_bit_images_is_stored_in_the_model_and_used_for_new_files(
    tile_size: int | None, tmp_path: Path
) -> None:
    deep_dataset(tmp_path / "set", [ramp(0, 4000 + k) for k in range(10)])
    tiny = str(write_tiny(tmp_path / "tiny"))
    options = [tiny, "--dataset_name", str(tmp_path / "set")]
    if tile_size:
        options += ["--tile_size", str(tile_size), "--image_height", "64", "--image_width", "64"]
    recipe = load_recipe(options)
    assert recipe.data.pixel_range == "auto"
    data = load_data(recipe.data)
    recipe = with_pixel_range(recipe, data.pixel_range)
    low, high = map(float, recipe.data.pixel_range.split(","))
    assert low < 50
    assert 3900 < high < 4010
    model = build_recipe_model(recipe.model, recipe.data, data.categories)
    assert list(model.config.pixel_range) == [low, high]
    assert export_constants(model.config, "onnx", half=False, fixed_size=False)["preprocessing"]["pixel_range"]
    sample = eval_samples(data.valid, model.config, data.categories)[0]
    (frame,) = Predictor(model).frames([data.valid[0]["image"]["path"]])
    assert torch.equal(frame.pixel_values, sample["pixel_values"])
    assert len(sample["pixel_values"].unique()) > 90


def test_a_dataset_of_8_bit_images_leaves_the_range_open(tmp_path: Path) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path))])
    data = load_data(recipe.data)
    assert data.pixel_range is None
    assert with_pixel_range(recipe, data.pixel_range) == recipe
    assert build_recipe_model(recipe.model, recipe.data, data.categories).config.pixel_range is None


@pytest.mark.parametrize("height", [112, 518])
def test_transformers_processor_gives_images_of_exactly_the_models_size(height: int, tmp_path: Path) -> None:
    config = tiny_model(DINOV2, image_size=(height, 140)).config
    image_processor(config).save_pretrained(tmp_path)
    photo = np.zeros((48, 64, 3), np.uint8)
    for reader in (AutoImageProcessor, Mask2FormerImageProcessorPil):
        processor = reader.from_pretrained(tmp_path)
        assert processor(photo, return_tensors="pt")["pixel_values"].shape == (1, 3, height, 140)


def test_the_original_head_has_the_sizes_of_transformers_configuration() -> None:
    published = Mask2FormerConfig()
    given = {name: value for name, value in HEADS["original"].items() if not name.startswith("neck")}
    assert given == {name: getattr(published, name) for name in given}


def test_a_head_is_that_of_the_source_unless_it_is_named() -> None:
    assert "hidden_dim" not in head_settings(ModelArguments(init_from="run"))
    assert "hidden_dim" not in head_settings(ModelArguments(head_checkpoint="run"))
    assert head_settings(ModelArguments(init_from="run", head_config={"hidden_dim": 64}))["hidden_dim"] == 64
    assert head_settings(ModelArguments(init_from="run", head="original"))["hidden_dim"] == 256


def test_a_resumed_run_has_the_layers_and_the_head_of_its_checkpoint_not_those_of_the_same_name_today(
    tmp_path: Path,
) -> None:
    old = tiny_model(taps=(2,), neck="adapter", encoder_layers=2, no_object_weight=0.2)
    old.save_pretrained(tmp_path)
    recipe = ModelArguments(head="light", backbone_config=VIT, tune="full", discrimination_weight=1.0)
    data = DataArguments(dataset_name="any", image_height=32, image_width=64, tile_overlap=0.4, pixel_range="0,9")
    resumed = build_recipe_model(recipe, data, [Category(**one) for one in CATEGORIES], tmp_path)
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    assert taps_of(backbone_of(resumed.config)) == (2,)
    config = resumed.config
    assert (config.no_object_weight, config.discrimination_weight, config.quality_weight) == (0.2, 1.0, 0.0)
    assert (config.image_height, config.image_width, config.tile_overlap) == (32, 64, 0.4)
    assert (config.pixel_range, config.matrix_nms) == ((0.0, 9.0), True)


def test_models_of_dense_images_may_be_selected_by_the_figure_without_cocos_limit(tmp_path: Path) -> None:
    rows = load_coco(write_dense(tmp_path))["valid"]
    require_figure("unlimited_map", rows)
    with pytest.raises(RecipeError, match="unknown metric"):
        require_figure("unlimited_map", rows.select([0]))
