"""Deformable attention by `grid_sample` against transformers' own, and its softmax."""

from unittest.mock import patch

import torch

from m2f_trainer.model.deformable_attention import deformable_attention, small_softmax
from tests.model.attention_reference import SHAPES, assert_equal_to_transformers


def test_deformable_attention_and_its_gradients_are_transformers() -> None:
    """As compiled and on accelerators; the way of CPUs is in test_deformable_cpu.py."""
    with patch("torch.compiler.is_compiling", return_value=True):
        assert_equal_to_transformers(
            lambda value, places, weights: deformable_attention(value, SHAPES, places, weights)
        )


def test_a_small_softmax_is_torchs_also_far_from_zero_and_in_its_gradient() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(3, 5, 12, dtype=torch.float64) * 300).requires_grad_()
    found, expected = small_softmax(logits), logits.softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-300)
    gradient = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(output, logits, gradient)[0] for output in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
