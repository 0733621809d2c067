"""How often a training step makes the host wait for the device, counted on a simulated one (pretend_device.py)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerControl

from benchmarks.stock import CATEGORIES, scene
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.distributed import any_rank
from m2f_trainer.model.lora import set_tuning
from m2f_trainer.training.callbacks.guards import FiniteGuard
from m2f_trainer.training.trainer import M2FTrainer
from tests.model.pretend_device import DEVICE, Pretended, Waits, moved, sent
from tests.model.tiny import tiny_model


def step(model: nn.Module, batch: dict[str, Any], trainer: Any) -> torch.Tensor:
    """What the Trainer does in a step: divisors, forward, backward, clipping, our guard, AdamW."""
    divisors = M2FTrainer._get_num_items_in_batch(trainer, [batch], DEVICE)
    loss = model(**sent(batch), num_items_in_batch=divisors).loss
    loss.backward()
    arguments: Any = SimpleNamespace(output_dir="", process_index=0, seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, 0.01, foreach=False)
    guard = FiniteGuard(lambda: [batch], lambda: loss, lambda: norm, scaled=False)
    guard.on_pre_optimizer_step(arguments, SimpleNamespace(global_step=0), SimpleNamespace(), model=model)  # type: ignore[arg-type]
    torch.optim.AdamW(trained, foreach=False).step()
    return loss.detach()


def trainer_of(model: Any) -> Any:
    return SimpleNamespace(
        step_batches=[], accelerator=SimpleNamespace(unwrap_model=lambda one: one), model=model,
        args=SimpleNamespace(world_size=1), state=SimpleNamespace(max_steps=1, global_step=0), control=TrainerControl(),
    )  # fmt: skip


@pytest.mark.parametrize(("tune", "batch"), [("full", 2), ("full", 5), ("lora", 2), ("frozen", 2)])
def test_a_step_waits_twice_for_the_device_whatever_the_batch(tune: str, batch: int) -> None:
    """For the matching's costs, and for whether the gradients are finite."""
    model = tiny_model(categories=CATEGORIES).train()
    set_tuning(model, tune)
    images, _ = scene(batch, 64, 3)
    torch.manual_seed(0)
    expected = model(**images).loss
    with Waits() as waits:
        torch.manual_seed(0)
        loss = step(moved(model), images, trainer_of(model))
    torch.testing.assert_close(loss.held, expected.detach(), rtol=1e-5, atol=0)  # the step is the true one
    assert +waits.seen == {"copy to the host": 1, "aten::_local_scalar_dense": 1}


def test_asking_the_other_ranks_for_a_signal_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: None)
    for flag in (False, True):
        with Waits() as waits:
            assert any_rank(flag, DEVICE) is flag
        assert waits.total == 1


def test_batches_cross_to_a_device_without_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr("torch.accelerator.is_available", lambda there=there: there)
        arguments = TrainArguments(report_to="none")
        assert arguments.accelerator_config.non_blocking is arguments.dataloader_pin_memory is there


@pytest.mark.parametrize(
    "wait",
    [
        lambda one: one.sum().item(),
        lambda one: bool((one > 0).any()),
        lambda one: one.cpu(),
        lambda one: one[one > 0],
        lambda one: one.nonzero(),
        lambda one: torch.ones(3).to(one.device),
        lambda one: one.new_zeros(3).copy_(torch.ones(3)),
        lambda one: torch.repeat_interleave(one, (one > 0).long()),
        lambda one: one.unique(),
    ],
)
def test_what_waits_is_counted(wait: Any) -> None:
    with Waits() as waits:
        wait(Pretended(torch.ones(3)))
    assert waits.total == 1


def test_what_does_not_wait_is_not_counted() -> None:
    with Waits() as waits:
        one = Pretended(torch.ones(3))
        torch.ones(3).to(one.device, non_blocking=True)
        one[torch.arange(2, device=one.device)] = one.new_full((2,), 5) * 2
        one.masked_fill(one > 5, 0.0).sum()
    assert waits.total == 0
