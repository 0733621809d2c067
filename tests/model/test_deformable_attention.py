"""The operator of deformable attention, its choice of an implementation, and its softmax."""

import pytest
import torch
from torch import Tensor

from m2f_trainer.model.deformable_attention import attend, check_equal, deformable_attention, small_softmax
from m2f_trainer.model.deformable_cpu import attend_rows, attend_rows_backward
from m2f_trainer.model.deformable_grid import attend_grid, attend_grid_backward
from tests.model.attention_reference import SHAPES, assert_equal_to_transformers, in_pixels, inputs


def operator(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    return deformable_attention(value, SHAPES, places, weights)


def test_the_operator_and_its_gradients_are_transformers() -> None:
    assert_equal_to_transformers(operator)


@pytest.mark.filterwarnings("default")  # torch's compiler looks at the gradients of inputs that aren't leaves
def test_torch_compile_leaves_the_operator_whole() -> None:
    assert_equal_to_transformers(torch.compile(operator, backend="aot_eager", fullgraph=True))


@pytest.mark.filterwarnings("default")  # as above
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_operator_says_the_shapes_types_and_strides_of_its_results(kind: torch.dtype) -> None:
    """By torch's own examination of a registered operator: schema, autograd, fake tensors, dynamic shapes."""
    value, locations, weights = inputs()
    tensors = value.to(kind), in_pixels(locations).float(), weights.float()
    tensors = tuple(one.detach().requires_grad_() for one in tensors)
    torch.library.opcheck(attend, (*tensors, [side for shape in SHAPES for side in shape]), atol=1e-2, rtol=1e-2)


def test_half_precision_values_are_summed_in_float32() -> None:
    value, locations, weights = (one.detach() for one in inputs())
    found = operator(value.bfloat16(), in_pixels(locations).float(), weights.float())
    exact = operator(value.bfloat16().double(), in_pixels(locations), weights)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)  # one rounding of the result


def test_the_check_of_kernels_accepts_an_equal_one_and_names_a_wrong_one() -> None:
    reference, device = (attend_grid, attend_grid_backward), torch.device("cpu")
    check_equal((attend_rows, attend_rows_backward), reference, device)
    with pytest.raises(AssertionError, match="not close"):
        check_equal((lambda *tensors: 1.01 * attend_rows(*tensors), attend_rows_backward), reference, device)


def test_a_small_softmax_is_torchs_also_far_from_zero_and_in_its_gradient() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(3, 5, 12, dtype=torch.float64) * 300).requires_grad_()
    found, expected = small_softmax(logits), logits.softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-300)
    gradient = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(output, logits, gradient)[0] for output in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
