"""Both ways of deformable attention against transformers' own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from m2f_trainer.model import deformable_cpu as row_sampling
from m2f_trainer.model.deformable_attention import deformable_attention, small_softmax
from m2f_trainer.model.deformable_cpu import with_border, without_border

SHAPES = ((3, 5), (6, 4), (1, 1))
LENGTH = 40


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """value (2, 40, 2, 4), locations from -1 to 2, far outside the maps, and weights."""
    torch.manual_seed(0)
    value = torch.randn(2, LENGTH, 2, 4, dtype=dtype)
    locations = torch.rand(2, LENGTH, 2, 3, 2, 2, dtype=dtype) * 3 - 1
    weights = torch.rand(2, LENGTH, 2, 3, 2, dtype=dtype)
    return value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()


def places(locations: Tensor) -> Tensor:
    """Of [0, 1] in pixels."""
    sizes = locations.new_tensor([[width, height] for height, width in SHAPES])
    return locations * sizes.unsqueeze(1) - 0.5


@pytest.mark.parametrize("by_rows", [True, False])
def test_deformable_attention_and_its_gradients_are_transformers(
    by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sampling, "QUERIES_AT_ONCE", 16)
    value, locations, weights = inputs()
    expected = multi_scale_deformable_attention(value, SHAPES, locations, weights)
    with patch("torch.compiler.is_compiling", return_value=not by_rows):
        found = deformable_attention(value, SHAPES, places(locations), weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, (value, locations, weights), gradient),
        torch.autograd.grad(expected, (value, locations, weights), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_a_small_softmax_is_torchs_also_far_from_zero_and_in_its_gradient() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(3, 5, 12, dtype=torch.float64) * 300).requires_grad_()
    found, expected = small_softmax(logits), logits.softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-300)
    gradient = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(output, logits, gradient)[0] for output in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton comes with torch for CUDA")
def test_the_triton_kernels_and_their_gradients_are_transformers() -> None:
    """By Triton's interpreter, which has to be asked for before anything imports triton: in a process of its own."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", "tests.model.triton_interpreted"], cwd=root, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is there")
def test_the_triton_switch_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match="M2F_TRITON=1 needs the package triton"):
        import m2f_trainer.model.deformable_triton  # noqa: F401


def test_places_that_are_not_numbers_read_nothing() -> None:
    value, locations, weights = inputs()
    found = deformable_attention(value, SHAPES, torch.full_like(locations, torch.nan), weights)
    assert found.eq(0).all()


def test_the_border_comes_off_as_it_went_on() -> None:
    value = torch.randn(LENGTH, 2, 4)
    assert torch.equal(without_border(with_border(value, SHAPES), SHAPES), value)
