"""Run by test_deformable_triton.py with TRITON_INTERPRET=1: the kernels against transformers' deformable attention."""

from torch import Tensor

from m2f_trainer.model.deformable_triton import TritonSampling
from tests.model.attention_reference import SHAPES, assert_equal_to_transformers, assert_nan_reads_nothing


def attention(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Our kernels' output."""
    output: Tensor = TritonSampling.apply(value, places, weights, SHAPES)
    return output


if __name__ == "__main__":
    assert_equal_to_transformers(attention)
    assert_nan_reads_nothing(attention)
