"""What "auto" resolves to, against hand-made numbers."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f_trainer.config.recipe import load_recipe, rows
from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.errors import RecipeError, TrainingError
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.training import auto as automatic
from m2f_trainer.training.prepare import train_samples, train_transform
from m2f_trainer.training.run import train
from tests.model.tiny import tiny_model
from tests.training.runs import write_tiny

AUTOMATIC = [name for name, row in rows().items() if row.auto]


@pytest.mark.parametrize(("images", "rate"), [(16, 1e-4), (4, 5e-5), (64, 2e-4), (32, 1e-4 * math.sqrt(2))])
def test_the_learning_rate_goes_with_the_root_of_the_images_a_step(images: int, rate: float) -> None:
    assert automatic.rate_for(images) == pytest.approx(rate)


def test_batches_are_accumulated_to_sixteen_images_on_all_devices() -> None:
    assert [automatic.accumulation_for(images, 100) for images in (1, 2, 8, 12, 16, 64)] == [16, 8, 2, 1, 1, 1]
    assert [automatic.accumulation_for(images, 5) for images in (1, 2, 8)] == [5, 3, 1], "an epoch has no more batches"


def test_small_datasets_are_seen_more_often() -> None:
    assert [automatic.epochs_for(images) for images in (10, 499, 500, 9_999, 118_000)] == [150, 150, 75, 40, 25]


@pytest.mark.parametrize(
    ("objects", "queries"), [([0, 1, 2], 20), ([30] * 10, 30), ([31] * 10, 40), ([*[5] * 995, *[90] * 5], 20)]
)
def test_queries_are_what_99_of_100_samples_need_in_tens(objects: list[int], queries: int) -> None:
    found, reason = automatic.queries_for(np.array(objects))
    assert found == queries
    assert reason.endswith(f"one has {max(objects)}")


def test_queries_stay_within_the_limit_and_tiles_are_advised() -> None:
    found, reason = automatic.queries_for(np.array([10_609]))
    assert found == 10_000
    assert "at most 10609 objects" in reason
    assert reason.endswith("more than 10,000 queries are not possible: use tiles (tile_size)")


@pytest.mark.parametrize(
    ("room", "limit", "found"),
    [(100, 16, 16), (100, 12, 8), (100, 1, 1), (9, 16, 8), (3, 16, 2), (1, 16, 1), (0, 16, 0)],
)
def test_the_largest_power_of_two_that_fits_is_found_and_nothing_is_tried_twice(
    room: int, limit: int, found: int
) -> None:
    tried: list[int] = []
    assert automatic.largest_power_of_two(lambda images: not tried.append(images) and images <= room, limit) == found  # type: ignore[func-returns-value]
    assert len(tried) == len(set(tried))
    assert max(tried) <= limit


def test_a_trial_step_takes_the_images_with_most_objects_and_changes_no_weight(tmp_path: Path) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path, learning_rate="auto", per_device_train_batch_size="auto"))])
    rows = load_coco(tmp_path / "data")["train"]
    categories = categories_of(rows)
    dataset = InstanceDataset(rows, train_transform(recipe.data, 0), categories)
    (sample,) = automatic.samples_with_most_objects(dataset, 1)
    objects = {row["image_id"]: sum(not one["iscrowd"] for one in row["objects"]) for row in rows}
    assert objects[sample["image_id"]] == max(objects.values())
    model = tiny_model(categories=[vars(category) for category in categories]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert automatic.fits(model, [sample], recipe.train)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_device_that_holds_no_image_is_an_error_with_levers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path))])
    rows = load_coco(tmp_path / "data")["train"]
    dataset = InstanceDataset(rows, train_transform(recipe.data, 0), categories_of(rows))
    assert automatic.images_per_device(tiny_model, dataset, recipe.train, 16) == 2, "a CPU"

    class OnAnother:
        device, gradient_checkpointing = torch.device("meta"), False

    monkeypatch.setattr(automatic, "fits", lambda *_: False)
    with pytest.raises(
        TrainingError, match=r"not even one image of this size fits .*Lower per_device_train_batch_size"
    ):
        automatic.images_per_device(tiny_model, dataset, OnAnother(), 16)  # type: ignore[arg-type]


def test_a_run_saves_and_logs_the_values_of_auto_and_a_resumed_one_keeps_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = dict.fromkeys(AUTOMATIC, "auto")
    path = write_tiny(tmp_path, **words)
    with caplog.at_level(logging.WARNING):
        train(load_recipe([str(path)]))
    assert (
        "auto: num_queries = 20, num_train_epochs = 150, per_device_train_batch_size = 2, "
        "gradient_accumulation_steps = 2, learning_rate = 5e-05; 99 % of the training samples have at most "
    ) in caplog.text
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = json.loads((checkpoint / "recipe.json").read_text())
    expected = {"num_queries": 20, "learning_rate": 5e-5, "per_device_train_batch_size": 2, "num_train_epochs": 150}
    expected |= {"gradient_accumulation_steps": 2}
    assert load_model(str(checkpoint)).config.num_queries == 20
    assert {name: saved[name] for name in AUTOMATIC} == pytest.approx(expected)

    def unasked(*_: object) -> int:
        raise AssertionError

    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text("{}")  # as a finished run leaves it, whose recipe is no new run's
    (checkpoint / "recipe.json").write_text(json.dumps({**saved, "save_head": str(tmp_path / "head")}))
    recipe = load_recipe([str(path)])
    rows = load_coco(tmp_path / "data")["valid"]
    again = automatic.resolve(recipe, train_samples(rows, recipe.data, 0, categories_of(rows)), checkpoint, unasked)
    assert {name: ({**vars(again.train), **vars(again.model)})[name] for name in AUTOMATIC} == pytest.approx(expected)


def test_auto_is_accepted_by_five_fields_and_by_no_other() -> None:
    given = [token for name in AUTOMATIC for token in (f"--{name}", "auto")]
    recipe = load_recipe(["--dataset_name", "coco", *given])
    assert all(({**vars(recipe.train), **vars(recipe.model)})[name] == "auto" for name in AUTOMATIC)
    with pytest.raises(RecipeError, match="--weight_decay"):
        load_recipe(["--dataset_name", "coco", "--weight_decay", "auto"])
    with pytest.raises(RecipeError, match="--learning_rate"):
        load_recipe(["--dataset_name", "coco", "--learning_rate", "Auto"])
