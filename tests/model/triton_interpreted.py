"""Run by test_deformable_triton.py with TRITON_INTERPRET=1: the kernels against transformers' deformable attention."""

import torch

from m2f_trainer.model.deformable_attention import check_equal
from m2f_trainer.model.deformable_grid import attend_grid, attend_grid_backward
from m2f_trainer.model.deformable_triton import attend_triton, attend_triton_backward
from tests.model.attention_reference import assert_equal_to_transformers, assert_nan_reads_nothing, attention_of

if __name__ == "__main__":
    kernels = attend_triton, attend_triton_backward
    assert_equal_to_transformers(attention_of(*kernels))
    assert_nan_reads_nothing(attention_of(*kernels))
    check_equal(kernels, (attend_grid, attend_grid_backward), torch.device("cpu"))
