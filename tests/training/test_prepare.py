"""The parts of a run that are built from recipe values."""

from pathlib import Path

import pytest

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.training.prepare import augmentation_seed, eval_samples, load_data, report_overfull, train_samples
from tests.training.runs import write_tiny


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
        eval_samples(data.valid, recipe.data, data.categories),
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
