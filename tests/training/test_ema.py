"""The running average of the weights: its values, its users, and that it is restored exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.run_folder import read_metrics
from m2f_trainer.training import ema, run
from m2f_trainer.training.evaluate import evaluate_folder
from tests.training.runs import write_tiny


def test_the_average_is_that_of_the_formula_and_changes_places_with_the_weight() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    average, state, expected = ema.Average(0.5), TrainerState(), None
    for step in range(20):
        weight.grad = torch.randn(2, dtype=torch.float64)
        optimizer.step()
        state.global_step = step
        average.on_optimizer_step(None, state, TrainerControl(), optimizer=optimizer)  # type: ignore[arg-type]
        decay = min(0.5, (step + 2) / (step + 11))
        expected = weight.detach().clone() if expected is None else decay * expected + (1 - decay) * weight.detach()
    assert expected is not None
    raw = weight.detach().clone()
    with ema.averaged(optimizer):
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, raw)
    assert not torch.allclose(raw, expected)


def test_without_averages_or_optimizer_nothing_changes() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with ema.averaged(torch.optim.AdamW([weight])), ema.averaged(None):
        assert torch.equal(weight, torch.ones(2))


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """A finished run with an average, and the raw weights after each of its steps."""
    from transformers import TrainerCallback

    folder = tmp_path_factory.mktemp("average")
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen[state.global_step] = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    usual = run.run_callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_callbacks", lambda args: [Look(), *usual(args)])
        recipe = write_tiny(folder, ema_decay=0.9, load_best_model_at_end=False)
        run.train(load_recipe([str(recipe)]))
    return folder, seen


def test_checkpoints_and_the_final_model_hold_the_average(averaged_run: Any) -> None:
    folder, seen = averaged_run
    name = "class_predictor.weight"
    expected = seen[1][name]
    for step in (2, 3, 4):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * seen[step][name]
        if step % 2 == 0:
            saved = load_model(str(folder / "run" / f"checkpoint-{step}")).state_dict()[name]
            torch.testing.assert_close(saved, expected)
    torch.testing.assert_close(load_file(folder / "run" / "model.safetensors")[name], expected)
    assert not torch.allclose(expected, seen[4][name], atol=1e-5)


def test_the_figures_of_a_checkpoint_are_those_of_its_averaged_model(averaged_run: Any) -> None:
    folder, _ = averaged_run
    checkpoint = folder / "run" / "checkpoint-4"
    again = evaluate_folder(str(checkpoint), str(folder / "data"), batch_size=1)
    held = read_metrics(checkpoint / "metrics.json")
    assert again["eval_mar_100"] == pytest.approx(held["eval_mar_100"], abs=1e-9)
    assert again["eval_map"] == pytest.approx(held["eval_map"], abs=1e-9)


def test_with_the_best_checkpoint_loaded_at_the_end_its_average_is_the_final_model(tmp_path: Path) -> None:
    run.train(load_recipe([str(write_tiny(tmp_path, ema_decay=0.9, tune="lora", lora_rank=2))]))
    best = Path(json.loads((tmp_path / "run" / "trainer_state.json").read_text())["best_model_checkpoint"])
    final, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", best))
    assert all(torch.equal(final[name], kept[name]) for name in kept)
