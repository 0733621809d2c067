"""Deformable attention on CPUs against transformers' own."""

import pytest
import torch

from m2f_trainer.model import deformable_cpu
from m2f_trainer.model.deformable_cpu import attend_rows, attend_rows_backward, with_border, without_border
from tests.model.attention_reference import (
    LENGTH,
    SHAPES,
    assert_equal_to_transformers,
    assert_nan_reads_nothing,
    attention_of,
)


@pytest.mark.parametrize("queries_at_once", [16, 512])
def test_row_sampling_and_its_gradients_are_transformers(queries_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_cpu, "QUERIES_AT_ONCE", queries_at_once)
    assert_equal_to_transformers(attention_of(attend_rows, attend_rows_backward))


def test_places_that_are_not_numbers_read_nothing() -> None:
    assert_nan_reads_nothing(attention_of(attend_rows, attend_rows_backward))


def test_removing_the_border_undoes_adding_it() -> None:
    value = torch.randn(LENGTH, 2, 4)
    assert torch.equal(without_border(with_border(value, SHAPES), SHAPES), value)
