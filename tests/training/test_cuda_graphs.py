"""The recorded step of `cuda_graphs`: the losses and gradients of the usual one. On a GPU only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.training.cuda_graphs import StepGraphs, can_record
from tests.model.tiny import images, labels, tiny_model

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def steps(model: M2FModel, count: int = 5, batch: int = 2, half: bool = True) -> list[Tensor]:
    """Losses and accumulated gradients of some batches, with an update after every second."""
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(count):
        torch.manual_seed(step)
        inputs: dict[str, Any] = {"pixel_values": images()[:batch].cuda() + step, **moved(labels(), batch)}
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = model(**inputs).loss
        loss.backward()
        found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        if step % 2:  # the gradients of two batches are accumulated
            optimizer.step()
            optimizer.zero_grad()
    return found


def moved(given: dict[str, Any], batch: int) -> dict[str, Any]:
    return {name: [one.cuda() for one in values[:batch]] for name, values in given.items()}


@on_a_gpu
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-3), (True, 5e-2)])
def test_recorded_steps_have_the_losses_and_gradients_of_the_usual_ones(half: bool, tolerance: float) -> None:
    model = tiny_model(quality_weight=2.0).cuda().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = steps(model, half=half)
    model.load_state_dict(state)
    graphs = StepGraphs(model.model)
    found = steps(model, half=half)
    assert graphs.recording is not None
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance / 10)


@on_a_gpu
def test_other_shapes_evaluation_and_a_released_graph_run_as_usual() -> None:
    model = tiny_model().cuda().train()
    graphs = StepGraphs(model.model)
    steps(model, 1)
    recorded = graphs.shapes
    steps(model, 1, batch=1)
    assert graphs.shapes == recorded
    with torch.no_grad():
        assert model.eval()(images().cuda()).masks_queries_logits.isfinite().all()
    graphs.release()
    assert graphs.recording is None
    steps(model.train(), 1, batch=1)
    assert graphs.shapes is not None
    assert graphs.shapes[0][0] == 1


@on_a_gpu
def test_a_model_that_cannot_be_recorded_trains_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model().cuda().train()
    usual = model.model.forward

    def waits(*inputs: Any) -> Any:
        hidden, *others = usual(*inputs)
        return hidden + 0 * hidden.sum().item(), *others

    model.model.forward = waits
    graphs = StepGraphs(model.model)
    assert all(tensor.isfinite().all() for tensor in steps(model, 2))
    assert graphs.recording is None
    assert sum("can't be recorded" in record.message for record in caplog.records) == 1


def test_nothing_is_recorded_on_a_cpu(tmp_path: Path) -> None:
    assert not can_record(TrainArguments(output_dir=str(tmp_path), use_cpu=True))
