"""What happens beside the steps."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m2f_trainer.distributed import any_rank
from m2f_trainer.training.callbacks.progress import DataWait, SeedEveryStep


def test_a_steps_random_numbers_follow_from_seed_step_and_rank_alone() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        values: Any = SimpleNamespace(seed=seed, process_index=rank), SimpleNamespace(global_step=step)
        SeedEveryStep().on_step_begin(*values, control=None)  # type: ignore[arg-type]
        return torch.rand(()).item()

    first = draw(1, 2, 0)
    torch.rand(5)
    assert draw(1, 2, 0) == first
    assert len({draw(seed, step, rank) for seed in (1, 2) for step in (2, 3) for rank in (0, 1)}) == 8


def test_the_share_of_time_spent_waiting_for_data_is_logged() -> None:
    wait = DataWait()
    state: Any = SimpleNamespace(log_history=[{"loss": 1.0}])
    no: Any = None
    wait.on_epoch_begin(no, state, no)
    time.sleep(0.06)  # waiting for a batch
    wait.on_step_begin(no, state, no)
    time.sleep(0.02)  # the step
    wait.on_step_end(no, state, no)
    logs = {"loss": 1.0}
    wait.on_log(no, state, no, logs=logs)
    assert logs["data_wait"] == state.log_history[-1]["data_wait"] == pytest.approx(0.75, abs=0.15)
    time.sleep(0.05)  # an evaluation
    wait.on_evaluate(no, state, no)
    wait.on_step_begin(no, state, no)
    time.sleep(0.02)
    wait.on_step_end(no, state, no)
    wait.on_log(no, state, no, logs=logs)
    assert logs["data_wait"] < 0.1


def test_without_other_ranks_a_vote_is_ones_own() -> None:
    device = torch.device("cpu")
    assert any_rank(True, device)
    assert not any_rank(torch.tensor(False), device)
