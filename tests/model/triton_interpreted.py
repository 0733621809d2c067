"""Run by test_deformable.py with TRITON_INTERPRET=1: the kernels against transformers' own, forward and backward."""

import torch
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from m2f_trainer.model.deformable_triton import TritonSampling
from tests.model.test_deformable_attention import SHAPES, inputs, places


def main() -> None:
    value, locations, weights = inputs()
    expected = multi_scale_deformable_attention(value, SHAPES, locations, weights)
    found = TritonSampling.apply(value, places(locations), weights, SHAPES)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, (value, locations, weights), gradient),
        torch.autograd.grad(expected, (value, locations, weights), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    nowhere = TritonSampling.apply(value, torch.full_like(places(locations), torch.nan), weights, SHAPES)
    assert nowhere.eq(0).all()


if __name__ == "__main__":
    main()
