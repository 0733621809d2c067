"""bfloat16 is chosen on a CPU where it is faster, and not because the CPU has instructions for it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from m2f_trainer.config import bfloat16


@pytest.fixture(autouse=True)
def measured_again() -> Iterator[None]:
    bfloat16.cpu_is_faster_in_bf16.cache_clear()
    yield
    bfloat16.cpu_is_faster_in_bf16.cache_clear()


@pytest.mark.parametrize(("half", "chosen"), [(0.5, True), (0.95, False), (1.7, False)])
def test_the_faster_type_is_chosen(monkeypatch: pytest.MonkeyPatch, half: float, chosen: bool) -> None:
    def seconds(rows: Tensor, weight: Tensor) -> float:
        return half if rows.dtype == weight.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(bfloat16, "_seconds", seconds)
    assert bfloat16.cpu_is_faster_in_bf16() is chosen


def test_an_interruption_of_some_calls_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may take the core in the middle of a call; the least of several calls is compared."""
    taken = iter([9.0, 0.5] + [1.0, 30.0] * bfloat16.ROUNDS)
    monkeypatch.setattr(bfloat16, "_seconds", lambda rows, weight: next(taken))
    assert bfloat16.cpu_is_faster_in_bf16() is True


def test_a_call_is_timed() -> None:
    assert bfloat16._seconds(torch.ones(8, 4), torch.ones(4, 4)) > 0
