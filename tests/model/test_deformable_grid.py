"""Deformable attention by `grid_sample` against transformers' own."""

from m2f_trainer.model.deformable_grid import attend_grid, attend_grid_backward
from tests.model.attention_reference import SHAPES, assert_equal_to_transformers, attention_of


def test_deformable_attention_by_grid_sample_is_transformers() -> None:
    assert_equal_to_transformers(attention_of(attend_grid, attend_grid_backward))


def test_autograd_differentiates_it_as_an_exported_model_does() -> None:
    assert_equal_to_transformers(lambda value, places, weights: attend_grid(value, places, weights, SHAPES))
