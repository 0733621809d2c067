"""Learning rates by step, against the formulas of the schedules."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.training.optimizer import rate_factors, shaped

STEPS = 100


def arguments(**fields: object) -> TrainArguments:
    given = {"use_cpu": True, "report_to": "none", "warmup_steps": 10, "learning_rate": 1.0, **fields}
    return TrainArguments(**given)  # type: ignore[arg-type]


def test_polynomial_cosine_and_step_have_the_values_of_their_formulas() -> None:
    warm = [0, 0.5]  # at steps 0 and 5 of a warm-up of 10
    after = (10, 55, 88, 90, 97)
    wanted = {
        "polynomial": [((100 - step) / 90) ** 0.9 for step in after],
        "cosine": [0.5 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in after],
        "step": [1, 1, 1, 0.1, 0.01],
    }
    for name, values in wanted.items():
        head, backbone = rate_factors(arguments(lr_scheduler_type=name), STEPS)
        assert [head(step) for step in (0, 5, *after)] == pytest.approx(warm + values), name
        assert [backbone(step) for step in range(STEPS)] == [head(step) for step in range(STEPS)]


@pytest.mark.parametrize("first", [20, 0.2])
def test_the_backbone_is_frozen_while_the_head_starts_and_then_warms_up(first: float) -> None:
    head, backbone = rate_factors(arguments(lr_scheduler_type="constant_with_warmup", head_first_steps=first), STEPS)
    assert [head(step) for step in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert [backbone(step) for step in (0, 5, 19, 20, 25, 30, 99)] == [0, 0, 0, 0, 0.5, 1, 1]


def test_a_schedule_has_the_rates_of_the_factors_and_resumes_at_any_step() -> None:
    given = arguments(lr_scheduler_type="step", lr_milestones=[0.5], head_first_steps=20)

    def make() -> LambdaLR:
        weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
        named = zip(weights, ("neck and head", "backbone"), strict=True)
        optimizer = torch.optim.SGD([{"params": [weight], "name": name} for weight, name in named], lr=1.0)
        schedule = shaped(get_scheduler(given.lr_scheduler_type, optimizer, 10, STEPS), given, STEPS)
        assert isinstance(schedule, LambdaLR)
        return schedule

    schedule = make()
    for step in range(STEPS):
        if step in (25, 60):
            saved = schedule.state_dict(), schedule.optimizer.state_dict()
            schedule = make()
            schedule.optimizer.load_state_dict(saved[1])
            schedule.load_state_dict(saved[0])
        wanted = [factor(step) for factor in rate_factors(given, STEPS)]
        assert [group["lr"] for group in schedule.optimizer.param_groups] == wanted, step
        assert schedule.get_last_lr() == wanted, step
        schedule.optimizer.step()
        schedule.step()


def test_a_schedule_without_a_shape_is_the_one_of_transformers() -> None:
    schedule = get_scheduler("cosine", torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 10, STEPS)
    assert shaped(schedule, arguments(lr_scheduler_type="cosine"), STEPS) is schedule


def test_step_is_the_originals_schedule_and_milestones_are_shares() -> None:
    assert arguments(lr_scheduler_type="step").lr_milestones == [0.889, 0.963]
    with pytest.raises(RecipeError, match=r"expected fractions of the run, between 0 and 1, got \[500\]"):
        arguments(lr_milestones=[500])
