"""A loss, gradient or weight that is not finite stops the run within a step, and no checkpoint holds it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from m2f_trainer.model.mask2former import M2FModel, load_model
from m2f_trainer.training.guards import read_batch
from m2f_trainer.training.resume import newest_complete
from tests.faults.tiny import Started, at_step, losses, options, train


def spoil_loss(image: int, value: float) -> None:
    """One image's loss is not finite; its gradients follow."""
    forward = M2FModel.forward

    def spoiled(self: M2FModel, **kwargs: Any) -> Any:
        outputs = forward(self, **kwargs)
        if self.training and image in kwargs["image_id"].tolist():
            outputs.loss = outputs.loss * value
        return outputs

    patch.object(M2FModel, "forward", spoiled).start()


def with_model(act: Callable[[M2FModel], object], step: int, event: str = "on_step_begin") -> None:
    """Act on the run's model at an event of a step."""
    models: list[M2FModel] = []
    init = M2FModel.__init__

    def remember(self: M2FModel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        models[:] = [self]

    patch.object(M2FModel, "__init__", remember).start()
    at_step(step, lambda: act(models[0]), event)


def spoil_gradient(model: M2FModel) -> None:
    """The loss is finite and a gradient is not."""
    model.class_predictor.weight.register_hook(lambda gradient: gradient * torch.nan)


@torch.no_grad()
def spoil_weight(model: M2FModel) -> None:
    """A weight becomes NaN."""
    next(model.parameters()).fill_(torch.nan)


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(value: float, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ran = train(tmp_path / "log", options(data, output), partial(spoil_loss, 4, value))
    assert ran.status == 1, ran.text[-3000:]
    [folder] = output.glob("not-finite-step-*")
    report = json.loads((folder / "report.json").read_text())
    assert 4 in report["image_ids"]
    assert len(report["image_ids"]) <= 2
    assert f"step {report['step']}: the loss is not finite. The step's images are " in ran.text
    saved = newest_complete(output)
    assert saved is None or report["step"] - int(saved.name.split("-")[1]) <= 2


def test_what_it_wrote_reproduces_the_step(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(tmp_path / "log", options(data, output), partial(with_model, spoil_gradient, 3))
    folder = output / "not-finite-step-4"
    report = json.loads((folder / "report.json").read_text())
    assert any("class_predictor" in name for name in report["gradients_not_finite"])
    batch = read_batch(folder / "batch-0-0.safetensors")
    assert batch["image_id"].tolist() == report["image_ids"]
    model = load_model(str(folder)).train()
    loss = model(**batch).loss
    assert torch.isfinite(loss)
    assert newest_complete(output) == output / "checkpoint-2"
    before = train(tmp_path / "again.log", options(data, tmp_path / "again"))
    assert before.status == 0
    assert loss.item() == pytest.approx(losses(tmp_path / "again")[4], rel=0.2)  # other random points


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_never_saved(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ran = train(tmp_path / "log", options(data, output), partial(with_model, spoil_weight, 4, "on_step_end"))
    assert ran.status == 1
    assert "other parameters are no longer finite, so no checkpoint is written" in ran.text
    assert newest_complete(output) == output / "checkpoint-2"


@pytest.mark.slow
def test_two_ranks_stop_together(data: Path, tmp_path: Path) -> None:
    arguments = options(data, tmp_path / "run", per_device_train_batch_size=1)
    ran = Started(tmp_path / "log", arguments, partial(spoil_loss, 4, float("nan")), ranks=2).join()
    assert [one.status for one in ran] == [1, 1]
    assert ran[0].text.count(" is not finite. The step's images are ") == 2
    [folder] = (tmp_path / "run").glob("not-finite-step-*")
    assert len(json.loads((folder / "report.json").read_text())["image_ids"]) == 2
