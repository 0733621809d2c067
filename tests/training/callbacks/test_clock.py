"""Runs limited in minutes, with a simulated clock."""

import json
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.training import run, trainer
from m2f_trainer.training.callbacks.clock import TICKS, Clock, clock_of
from m2f_trainer.training.optimizer import rate_factors
from tests.training.runs import write_tiny

EVALUATION = 30.0


class Time:
    """Seconds, as `time.monotonic` gives them."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def arguments(**fields: object) -> TrainArguments:
    given = {"use_cpu": True, "report_to": "none", "warmup_steps": 0.1, "max_minutes": 10.0, **fields}
    return TrainArguments(**given)  # type: ignore[arg-type]


class Run:
    """Steps of a second each, as the Trainer's loop calls its callbacks."""

    def __init__(self, time: Time, clock: Clock, step: int = 0, **fields: object) -> None:
        self.time, self.clock, self.args = time, clock, arguments(**fields)
        weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
        groups = [{"params": [w], "name": name} for w, name in zip(weights, ("neck and head", "backbone"), strict=True)]
        self.optimizer = torch.optim.SGD(groups, lr=2.0)
        self.schedule = LambdaLR(self.optimizer, lambda _: 1.0)
        self.state = TrainerState(global_step=step, max_steps=10**9)
        self.control = TrainerControl()
        self.keywords = {"optimizer": self.optimizer, "lr_scheduler": self.schedule}
        clock.on_train_begin(self.args, self.state, self.control, **self.keywords)

    def step(self, seconds: float = 1.0) -> list[float]:
        """One step; the rates that it was made at."""
        self.clock.on_step_begin(self.args, self.state, self.control, **self.keywords)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.step()
        self.schedule.step()
        self.time.seconds += seconds
        self.state.global_step += 1
        self.clock.on_step_end(self.args, self.state, self.control, **self.keywords)
        return rates


def test_the_rates_follow_the_time_and_not_the_steps() -> None:
    time = Time()
    run = Run(time, Clock(10, now=time), head_first_steps=0.5)
    head, backbone = rate_factors(run.args, TICKS)
    passed = 0.0
    for seconds in (0.0, 30.0, 200.0, 100.0, 250.0):
        tick = int(TICKS * passed / 600)
        assert run.step(seconds) == pytest.approx([2 * head(tick), 2 * backbone(tick)])
        assert run.schedule.get_last_lr() == [group["lr"] for group in run.optimizer.param_groups]
        passed += seconds


def test_the_run_ends_evaluated_and_saved_when_its_minutes_are_over() -> None:
    time = Time()
    run = Run(time, Clock(10, now=time))
    while not run.control.should_training_stop:
        assert run.state.global_step < run.state.max_steps
        assert not run.control.should_save
        run.step(7.0)
    assert run.state.global_step == run.state.max_steps == 86, "600 seconds by 7"
    assert run.control.should_evaluate
    assert run.control.should_save


def test_the_last_step_is_evaluated_and_saved_once_where_checkpoints_are_of_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_tiny(tmp_path, max_steps=-1, max_minutes=1.0, checkpointing_steps="epoch")
    seconds = count(step=12)
    monkeypatch.setattr(trainer, "clock_of", lambda *_: [Clock(1.0, now=lambda: float(next(seconds)))])
    run.train(load_recipe([str(recipe)]))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["step"] for entry in history if "eval_map" in entry]
    assert evaluated == sorted(set(evaluated))
    assert evaluated[-1] == history[-1]["step"]


def test_time_before_the_first_step_counts_but_not_in_the_forecast() -> None:
    time = Time()
    run = Run(time, Clock(10, passed=300, now=time))
    for _ in range(10):
        run.step(3.0)
    assert run.state.max_steps == 100, "300 seconds were left for steps of 3 seconds"


def test_the_schedule_begins_with_the_first_step() -> None:
    time = Time()
    run = Run(time, Clock(10, passed=300, now=time))
    assert run.step(15.0)[0] == 0, "the warm-up is a tenth of the 300 seconds that are left"
    assert run.step(15.0)[0] == pytest.approx(1)
    kept = run.clock.state()
    restored = Clock.from_state(kept)
    restored.now, restored.read_at = time, time()
    again = Run(time, restored, step=2)
    assert again.step(135.0)[0] == pytest.approx(2)
    head, _ = rate_factors(run.args, TICKS)
    assert again.step()[0] == pytest.approx(2 * head(TICKS * 165 // 300))


def test_a_checkpoint_of_an_earlier_version_goes_on_with_its_schedule() -> None:
    time = Time()
    run = Run(time, Clock(10, passed=300, now=time), step=7)
    head, _ = rate_factors(run.args, TICKS)
    assert run.step()[0] == pytest.approx(2 * head(TICKS // 2))


def test_a_resumed_run_has_the_rest_of_the_time_its_checkpoint_included() -> None:
    time = Time()
    first = Run(time, Clock(10, now=time))
    for _ in range(40):
        first.step(5.0)
    time.seconds += EVALUATION
    kept = first.clock.state()
    time.seconds += 10_000  # the machine was off
    restored = Clock.from_state(kept)
    restored.now, restored.read_at = time, time()
    again = Run(time, restored, step=40)
    assert again.clock.share() == pytest.approx((200 + EVALUATION) / 600)
    steps = 0
    while not again.control.should_training_stop:
        again.step(5.0)
        steps += 1
    assert steps == (600 - 200 - EVALUATION) / 5


def test_a_finished_run_that_is_resumed_is_at_its_last_step() -> None:
    time = Time()
    kept = Clock(10, passed=601, now=time).state()
    assert Run(time, Clock.from_state(kept), step=40).state.max_steps == 40


def test_a_restored_clock_counts_the_start_of_its_process(tmp_path: Path) -> None:
    kept = Clock(10, passed=60).state()
    restored, fresh = Clock.from_state(kept), Clock(10, passed=7)
    restored.add(fresh)
    assert restored.passed == pytest.approx(67, abs=1)


def test_a_run_of_minutes_takes_no_other_length_and_no_counted_warm_up() -> None:
    with pytest.raises(RecipeError, match="max_minutes and max_steps=50 both set the length of the run"):
        arguments(max_steps=50)
    with pytest.raises(RecipeError, match="warmup_steps=20: expected a fraction of the run, below 1"):
        arguments(warmup_steps=20)
    with pytest.raises(RecipeError, match="num_decay_steps=2000: expected a fraction of the run, below 1"):
        arguments(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 2000})
    with pytest.raises(RecipeError, match=r"logging_steps=0.1: expected a number of steps of at least 1, since"):
        arguments(logging_steps=0.1)
    with pytest.raises(RecipeError, match="lr_scheduler_type=reduce_lr_on_plateau follows the figures of evaluations"):
        arguments(lr_scheduler_type="reduce_lr_on_plateau")


def test_warmup_stable_decay_falls_in_the_last_fifth_of_the_minutes() -> None:
    time = Time()
    run = Run(time, Clock(10, now=time), lr_scheduler_type="warmup_stable_decay")
    rates = [run.step(60.0)[0] for _ in range(10)]
    assert rates == pytest.approx([0, *[2] * 8, 2 * (1 - 0.5**0.5)])


def test_only_a_run_of_minutes_has_a_clock() -> None:
    assert clock_of(TrainArguments(use_cpu=True, report_to="none"), 0.0) == []
    assert [type(one) for one in clock_of(arguments(), 0.0)] == [Clock]


def test_a_clock_without_a_begin_starts_now() -> None:
    [begun], [now] = clock_of(arguments(), time.monotonic() - 60), clock_of(arguments(), None)
    assert isinstance(begun, Clock)
    assert isinstance(now, Clock)
    assert begun.passed == pytest.approx(60, abs=5)
    assert now.passed == 0
