"""Attention in 16 bits on a CPU agrees with float64; in float32 it is torch's."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoBackbone, Dinov2Config, DINOv3ViTConfig

from m2f_trainer.model import attention as module
from m2f_trainer.model.attention import NAME, dot_product_attention

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}


def with_gradients(function, inputs: list[Tensor], mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of the three inputs, computed in `dtype`."""
    leaves = [one.to(dtype, copy=True).requires_grad_() for one in inputs]
    output = function(*leaves, mask)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype))
    return [output.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ value


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_in_16_bits_are_those_of_float64(masked: bool, dtype: torch.dtype, autocast: bool):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, rows, 16).to(dtype) for rows in (20, 37, 37)]
    mask = None
    if masked:
        mask = torch.rand(2, 1, 20, 37) > 0.5
        mask[..., 5] = True
        mask[0, 0, 3] = torch.arange(37) == 5  # one key only
    expected = with_gradients(reference, inputs, mask, torch.float64)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = with_gradients(dot_product_attention, inputs, mask, dtype)
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


def test_in_float32_it_is_torchs_function():
    inputs = [torch.randn(2, 3, rows, 16) for rows in (20, 37, 37)]
    mask = torch.rand(2, 1, 20, 37) > 0.2
    ours = with_gradients(dot_product_attention, inputs, mask, torch.float32)
    theirs = with_gradients(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), inputs, mask, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_fused_kernel_computes_what_would_need_much_memory(monkeypatch: pytest.MonkeyPatch):
    inputs = [torch.randn(1, 2, 40, 16).bfloat16() for _ in range(3)]
    monkeypatch.setattr(module, "MOST_SCORES", 2 * 40 * 40 - 1)
    assert torch.equal(dot_product_attention(*inputs), F.scaled_dot_product_attention(*inputs))
    monkeypatch.setattr(module, "MOST_SCORES", 2 * 40 * 40)
    assert not torch.equal(dot_product_attention(*inputs), F.scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize(
    "config",
    [
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            image_size=28,
            patch_size=14,
        ),
        DINOv3ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.3
        ),
    ],
    ids=["dinov2", "dinov3"],
)
def test_a_backbone_computes_the_same_with_it(config, tmp_path: Path):
    torch.manual_seed(0)
    theirs = AutoBackbone.from_config(config).eval()
    ours = AutoBackbone.from_config(deepcopy(config)).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation(NAME)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        for one, other in zip(theirs(images).feature_maps, ours(images).feature_maps, strict=True):
            assert torch.equal(one, other)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for one, other in zip(theirs(images).feature_maps, ours(images).feature_maps, strict=True):
                assert not torch.equal(one, other)
                torch.testing.assert_close(one, other, rtol=0.02, atol=0.03)
    ours.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
