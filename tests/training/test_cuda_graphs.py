"""The recorded step of `cuda_graphs`: the losses and gradients of the usual one. Simulated where there is no GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import TrainingError
from m2f_trainer.model.lora import set_tuning
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.training.cuda_graphs import StepGraphs, can_record, relative_difference
from tests.model.pretend_device import Pretended, Waits, moved
from tests.model.pretend_graphs import pretend_graphs
from tests.model.test_families import FAMILIES, family
from tests.model.tiny import DINOV2, images, labels, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        pretend_graphs(monkeypatch)


def steps(model: nn.Module, count: int = 4, batch: int = 2, half: bool = False) -> list[Tensor]:
    """The loss of each batch and the gradients of every update, which follow two accumulated batches."""
    found = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    for step in range(count):
        torch.manual_seed(step)
        pixels = images()[:batch].to(DEVICE) + step
        given = {name: [one.to(DEVICE) for one in values[:batch]] for name, values in labels().items()}
        with torch.autocast(DEVICE, torch.bfloat16, half, cache_enabled=False):  # it sums gradients in bfloat16
            loss = model(pixels, **given).loss
        loss.backward()
        found.append(loss.detach().clone())
        if step % 2:
            assert all(parameter.grad is not None for parameter in trained)
            found += [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
    return found


def built(tune: str = "full", backbone: dict[str, Any] | None = None, **fields: Any) -> M2FModel:
    model = tiny_model(backbone, quality_weight=2.0, discrimination_weight=1.0, **fields)
    set_tuning(model, tune)
    return model.to(DEVICE).train()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("tune", "fields"),
    [("full", {}), ("lora", {"backbone": DINOV2, "image_size": (56, 56)}), ("frozen", {"neck": "adapter"})],
)
def test_recorded_batches_have_the_losses_and_gradients_of_the_usual_ones(
    tune: str, fields: dict[str, Any], half: bool
) -> None:
    model, recorded = built(tune, **fields), built(tune, **fields)
    recorded.load_state_dict(model.state_dict())
    graphs = StepGraphs(recorded.model)
    count = 2 if half else 4  # after an update, differences in bfloat16 grow
    expected, found = steps(model, count, half=half), steps(recorded, count, half=half)
    assert graphs.recording is not None
    assert relative_difference(found, expected) < (1e-2 if DEVICE == "cuda" else 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_recorded_and_never_waits_for_the_device(name: str) -> None:
    """A wait, or a copy from the host, can't be recorded: none of them, counted on a simulated device."""
    graphs = StepGraphs(built(backbone=family(name)).model)
    graphs(images().float().to(DEVICE))
    assert graphs.recording is not None
    assert graphs.recording.difference < 1e-5
    with Waits() as waits:
        outputs = moved(tiny_model(family(name)).train()).model(Pretended(images().float()))
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert not +waits.seen


def test_other_shapes_evaluation_and_a_released_graph_run_as_usual() -> None:
    model = built()
    graphs = StepGraphs(model.model)
    steps(model, 2)
    recorded = graphs.shapes
    steps(model, 2, batch=1)
    assert graphs.shapes == recorded
    with torch.no_grad():
        assert model.eval()(images().to(DEVICE)).masks_queries_logits.isfinite().all()
    graphs.release()
    assert graphs.recording is None
    steps(model.train(), 2, batch=1)
    assert graphs.shapes is not None
    assert graphs.shapes[0][0] == 1


def test_kept_backbone_features_are_inputs_of_the_graph() -> None:
    model = built("frozen")
    usual, graphs = model.model.forward, StepGraphs(model.model)
    pixels = images().float().to(DEVICE)
    maps = [torch.randn_like(one) for one in model.encoder.backbone_features(pixels)]
    for scale in (1, 2):
        scaled = [scale * one for one in maps]
        found, expected = model.model(pixels, scaled), usual(pixels, scaled)
        assert relative_difference(found, expected) < (1e-3 if DEVICE == "cuda" else 1e-6)
    assert graphs.recording is not None
    assert len(graphs.recording.inputs) == 1 + len(maps)


def test_recording_leaves_the_random_numbers_as_they_were() -> None:
    model = built()
    torch.manual_seed(3)
    expected = torch.rand(4, device=DEVICE)
    torch.manual_seed(3)
    StepGraphs(model.model)(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    assert torch.equal(torch.rand(4, device=DEVICE), expected)


def test_a_step_that_a_replay_does_not_repeat_runs_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    """Here the forward depends on a number of Python that grows with each call."""
    model, calls = built(), iter(range(1, 1000))
    usual = model.model.forward
    model.model.forward = lambda *inputs: tuple(next(calls) * output for output in usual(*inputs))
    graphs = StepGraphs(model.model)
    assert all(tensor.isfinite().all() for tensor in steps(model))
    assert graphs.recording is None
    assert [record.message for record in caplog.records if "cuda_graphs: not used" in record.message]


def test_a_model_that_reads_values_on_the_host_is_refused() -> None:
    model = built()
    usual = model.model.forward
    model.model.forward = lambda *inputs: tuple(output * output.sum().sign().item() ** 2 for output in usual(*inputs))
    StepGraphs(model.model)
    with pytest.raises(TrainingError, match=r"can't be recorded as CUDA graphs: .*captur.* Set cuda_graphs to false"):
        steps(model)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([torch.tensor([3.0, 4.5]), None], [torch.tensor([3.0, 4.0]), None], 0.1),
        ([torch.tensor([float("nan")])], [torch.ones(1)], float("inf")),
        ([None, torch.ones(1)], [torch.ones(1), torch.ones(1)], float("inf")),
    ],
)
def test_the_difference_is_relative_to_the_norm_of_all(found: Any, expected: Any, difference: float) -> None:
    assert relative_difference(found, expected) == pytest.approx(difference)


def test_nothing_is_recorded_on_a_cpu(tmp_path: Path) -> None:
    assert not can_record(TrainArguments(output_dir=str(tmp_path), use_cpu=True))
