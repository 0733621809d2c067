"""A loss, gradient or weight that is not finite stops the run within a step, and no checkpoint holds it."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from m2f_trainer.model.mask2former import M2FModel, load_model
from m2f_trainer.training.guards import read_batch
from m2f_trainer.training.resume import newest_complete
from tests.faults.tiny import Forked, dataset, losses, options, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("finite"))


def spoil_loss(image: int, value: float) -> None:
    """One image's loss is not finite; its gradients follow."""
    forward = M2FModel.forward

    def spoiled(self: M2FModel, **kwargs: Any) -> Any:
        outputs = forward(self, **kwargs)
        if self.training and image in kwargs["image_id"].tolist():
            outputs.loss = outputs.loss * value
        return outputs

    patch.object(M2FModel, "forward", spoiled).start()


def spoil_gradient(step: int) -> None:
    """The loss is finite and a gradient is not."""
    from tests.faults.tiny import at_step

    parameters: list[torch.nn.Parameter] = []
    init = M2FModel.__init__

    def remember(self: M2FModel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        parameters[:] = [p for n, p in self.named_parameters() if "class_predictor" in n]

    patch.object(M2FModel, "__init__", remember).start()

    def act() -> None:
        parameters[0].register_hook(lambda gradient: gradient * torch.nan)

    at_step(step, act)


def spoil_weight(step: int) -> None:
    """A weight becomes NaN after the update of a step that is saved."""
    from tests.faults.tiny import at_step

    parameters: list[torch.nn.Parameter] = []
    init = M2FModel.__init__

    def remember(self: M2FModel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        parameters[:] = list(self.parameters())

    patch.object(M2FModel, "__init__", remember).start()

    @torch.no_grad()
    def act() -> None:
        parameters[3].fill_(torch.nan)

    at_step(step, act, "on_step_end")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
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
    train(tmp_path / "log", options(data, output), partial(spoil_gradient, 3))
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


def test_a_weight_that_is_not_finite_is_never_saved(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ran = train(tmp_path / "log", options(data, output), partial(spoil_weight, 4))
    assert ran.status == 1
    assert "other parameters are no longer finite, so no checkpoint is written" in ran.text
    assert newest_complete(output) == output / "checkpoint-2"


@pytest.mark.slow
def test_two_ranks_stop_together(data: Path, tmp_path: Path) -> None:
    arguments = options(data, tmp_path / "run", per_device_train_batch_size=1)
    ran = Forked(tmp_path / "log", arguments, partial(spoil_loss, 4, float("nan")), ranks=2).join()
    assert [one.status for one in ran] == [1, 1]
    assert ran[0].text.count(" is not finite. The step's images are ") == 2
    [folder] = (tmp_path / "run").glob("not-finite-step-*")
    assert len(json.loads((folder / "report.json").read_text())["image_ids"]) == 2
