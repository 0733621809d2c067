"""The output of a dry run, compared with the run itself."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2f_trainer.cli import main as cli
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.model.lora import set_tuning
from m2f_trainer.training.dry_run import activations, aligned_columns, estimate, image_bytes, plan, time_text
from tests.model.test_families import family
from tests.model.tiny import tiny_model
from tests.training.runs import write_tiny


def test_a_dry_run_shows_groups_counts_steps_rates_and_memory_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_tiny(
        tmp_path, max_steps=100, warmup_steps=10, layer_decay=0.5, learning_rate="auto", head_first_steps=20
    )
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert cli.main(["train", str(recipe), "--dry_run", "--weight_decay", "0.01"]) == 0
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    text = "\n".join(lines)
    assert "100 optimizer steps, 2 per epoch: 50.0 epochs of 4 images" in text
    assert "2 images per step: 2 per device x 1 accumulated x 1 devices" in text
    (each, whole) = re.findall(r"about ([\d.e-]+) s a step on this machine, (\S+) in all", text)[0]
    minutes, seconds = whole.split(":")[-2:]
    assert 60 * int(minutes) + int(seconds) == pytest.approx(100 * float(each), rel=0.1, abs=1.5)
    groups = {
        line.rsplit(" ", 3)[0]: line.rsplit(" ", 3)[1:] for line in lines if line.endswith(("e-05 0.01", "e-06 0.01"))
    }
    rates = {name: float(cells[1]) for name, cells in groups.items()}
    top = 1e-4 * (2 / 16) ** 0.5
    expected = {
        "neck and head": top,
        "backbone, block 2": top,
        "backbone, block 1": top / 2,
        "backbone, block 0": top / 4,
    }
    assert rates == pytest.approx(expected, rel=1e-2)
    assert f"10 {top:.2e} 0.00e+00" in text, "at step 10 the head is warm, and the backbone is frozen"
    assert f"learning_rate {top}" in text
    assert "GB of memory per device" in text


def test_a_dry_run_counts_the_time_of_a_feature_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 images x 100,000 views, each of which a step does not compute again."""
    recipe = write_tiny(tmp_path, tune="frozen", feature_cache=100_000, max_steps=-1, max_minutes=0.1)
    assert cli.main(["train", str(recipe), "--dry_run"]) == 0
    (whole,) = re.findall(
        r"about (\S+) for the features of feature_cache, then .* so about 0 steps", capsys.readouterr().out
    )
    assert len(whole) >= len("01:00"), "more than the run's six seconds"
    model = tiny_model()
    set_tuning(model, "frozen")
    train = TrainArguments(use_cpu=True, per_device_train_batch_size=2, max_steps=10)
    few, many = (plan(model, train, images=5, instances=1, views=views) for views in (0, 3))
    assert few.cache_seconds == 0 < many.cache_seconds < 60
    text = time_text(replace(many, cache_seconds=75.0, step_seconds=0.5))
    assert text.startswith("about 01:15 for the features of feature_cache, then about 0.5 s a step on this machine")
    assert "machine, 01:20 in all" in text


def test_half_epochs_make_as_many_steps_as_the_trainer_takes() -> None:
    train = TrainArguments(use_cpu=True, report_to="none", num_train_epochs=0.5, per_device_train_batch_size=1)
    assert plan(tiny_model(), train, images=5, instances=1).steps == 3


def test_a_dry_run_shows_what_sharding_would_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_tiny(tmp_path, max_steps=2)
    for options, expected in (([], False), (["--fsdp", "true"], True)):
        assert cli.main(["train", str(recipe), "--dry_run", *options]) == 0
        assert ("Unsharded: each of N devices" in capsys.readouterr().out) == expected


def test_a_frozen_backbone_counts_as_parameters_without_gradients_and_moments() -> None:
    model = tiny_model()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    set_tuning(model, "frozen")
    trained = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    memory = estimate(model, 3, bf16=False, averaged=True)
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, trained, 3 * trained)
    assert memory.total(4) == weights + 4 * trained + 4 * memory.activations
    assert trained < weights


@pytest.mark.parametrize("tune", ["full", "frozen"])
def test_activations_extrapolated_from_small_images_are_those_of_the_full_size(tune: str) -> None:
    model = tiny_model(image_size=(256, 192))
    set_tuning(model, tune)
    state = torch.random.get_rng_state()
    assert activations(model, 5, False) == pytest.approx(image_bytes(model, (256, 192), 5, False), rel=0.02)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_memory_of_a_backbone_that_takes_one_size_is_measured_at_that_size() -> None:
    model = tiny_model(family("hiera"))
    assert activations(model, 2, False) == image_bytes(model, (64, 64), 2, False)


def test_columns_are_flush() -> None:
    assert aligned_columns([("a", "b"), ("long", "1234")]) == "a        b\nlong  1234"
    assert json.dumps(aligned_columns([("a",)])) == '"a"'
