"""A pixel, loss, gradient or weight that is not finite stops the run within a step, and no checkpoint holds it."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from m2f_trainer.data.collate import collate
from m2f_trainer.model.mask2former import M2FModel, load_model
from m2f_trainer.training.callbacks.guards import read_batch
from m2f_trainer.training.checkpointing.resume import newest_complete
from tests.faults.tiny import Prepare, Started, at_step, losses, options, train
from tests.training.engines import engine


def spoil_pixel(image: int) -> None:
    """One pixel of an image is NaN. Ours come as bytes; a data set of one's own may bring floats."""

    def spoiled(samples: Any) -> Any:
        batch = collate(samples)
        pixels = batch["pixel_values"] / 255
        pixels[batch["image_id"] == image, 0, 0, 0] = torch.nan
        return {**batch, "pixel_values": pixels}

    patch("m2f_trainer.training.trainer.collate", spoiled).start()


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


IN_IMAGE_4 = [
    partial(spoil_loss, 4, float("nan")),
    pytest.param(partial(spoil_loss, 4, float("inf")), marks=pytest.mark.slow),
    pytest.param(partial(spoil_pixel, 4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("spoil", IN_IMAGE_4, ids=["nan-loss", "inf-loss", "nan-pixel"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    spoil: Prepare, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ran = train(tmp_path / "log", options(data, output), spoil)
    assert ran.status == 1, ran.text[-3000:]
    [folder] = output.glob("not-finite-step-*")
    report = json.loads((folder / "report.json").read_text())
    assert 4 in report["image_ids"]
    assert len(report["image_ids"]) <= 2
    assert f"step {report['step']}: the loss is not finite. The step's images are " in ran.text
    saved = newest_complete(output)
    assert saved is None or report["step"] - int(saved.name.split("-")[1]) <= 2


@pytest.mark.slow
def test_what_it_wrote_reproduces_the_step(data: Path, whole: Path, tmp_path: Path) -> None:
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
    assert loss.item() == pytest.approx(losses(whole)[4], rel=0.2)  # other random points


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "step", "message"),
    [
        ("on_step_begin", 3, "step 4: the loss is not finite"),
        ("on_step_end", 4, "other parameters are no longer finite, so no checkpoint is written"),
    ],
)
def test_a_weight_that_is_not_finite_is_never_saved(
    event: str, step: int, message: str, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ran = train(tmp_path / "log", options(data, output), partial(with_model, spoil_weight, step, event))
    assert ran.status == 1
    assert message in ran.text
    assert newest_complete(output) == output / "checkpoint-2"


def on_rank_1(spoil: Prepare) -> None:
    if os.environ["RANK"] == "1":
        spoil()


SHARDING = ExitStack()


def sharded(spoil: Prepare) -> None:
    SHARDING.enter_context(engine("fsdp"))
    spoil()


OF_TWO_RANKS: dict[str, tuple[Prepare, str]] = {
    "loss": (partial(spoil_loss, 4, float("nan")), "the loss is not finite"),
    "pixel": (partial(spoil_pixel, 4), "the loss is not finite"),
    "loss, sharded": (partial(sharded, partial(spoil_loss, 4, float("nan"))), "the loss is not finite"),
    "gradient": (partial(on_rank_1, partial(with_model, spoil_gradient, 3)), "the gradient is not finite"),
    "weight": (partial(on_rank_1, partial(with_model, spoil_weight, 3)), "the loss is not finite"),
    "weight at a save": (
        partial(on_rank_1, partial(with_model, spoil_weight, 4, "on_step_end")), "parameters of another rank are no"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", OF_TWO_RANKS)
def test_two_ranks_stop_together_although_it_happens_on_one(what: str, data: Path, tmp_path: Path) -> None:
    spoil, message = OF_TWO_RANKS[what]
    output = tmp_path / "run"
    fields = {"per_device_train_batch_size": 1, "fsdp": True if "sharded" in what else None}
    ran = Started(tmp_path / "log", options(data, output, **fields), spoil, ranks=2).join()
    assert [one.status for one in ran] == [1, 1], ran[0].text[-3000:]
    assert message in ran[0].text
    assert ran[0].text.count("m2f train: step ") == 2
    saved = newest_complete(output)
    if what == "weight at a save":
        assert saved == output / "checkpoint-2"
        return
    [folder] = output.glob("not-finite-step-*")
    report = json.loads((folder / "report.json").read_text())
    assert len(report["image_ids"]) == 2
    if what != "weight":  # then the weights before the step are there, whole
        assert load_model(str(folder)).config.num_queries == 7
    assert saved is None or report["step"] - int(saved.name.split("-")[1]) <= 2
