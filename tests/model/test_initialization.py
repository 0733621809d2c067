"""New layers start as in the original Mask2Former: moments of each kind of layer, at its own sizes."""

import math

import pytest
import torch

from m2f_trainer.model.mask2former import M2FModel
from tests.model.tiny import VIT, tiny_model


@pytest.fixture(scope="module")
def model() -> M2FModel:
    """A head of the published widths, so that the figures are those of the original."""
    wide = {"hidden_dim": 256, "feature_size": 256, "mask_feature_size": 256, "num_attention_heads": 8}
    wide |= {"encoder_feedforward_dim": 1024, "dim_feedforward": 2048, "neck_channels": [256] * 4}
    return tiny_model(VIT, encoder_layers=1, decoder_layers=3, **wide)


PIXEL, QUERY = "model.pixel_level_module.decoder.", "model.transformer_module."


@pytest.mark.parametrize(("name", "std"), [
    (f"{PIXEL}input_projections.0.0.weight", 0.0625),  # xavier: sqrt(2 / (256 + 256))
    (f"{PIXEL}encoder.layers.0.fc1.weight", 0.0395),  # xavier: sqrt(2 / (256 + 1024))
    (f"{PIXEL}encoder.layers.0.fc2.bias", 1 / math.sqrt(3 * 1024)),  # torch's uniform(+-1/sqrt(fan in))
    (f"{PIXEL}mask_projection.weight", 0.0625),  # c2_xavier_fill: sqrt(1 / fan in)
    (f"{PIXEL}adapter_1.0.weight", 0.0625),
    (f"{PIXEL}layer_1.0.weight", 1 / math.sqrt(9 * 256)),
    (f"{PIXEL}level_embed", 1.0),
    (f"{QUERY}queries_features.weight", 1.0),
    (f"{QUERY}decoder.layers.0.self_attn.q_proj.weight", 0.0442),  # xavier of the packed (768, 256) matrix
    (f"{QUERY}decoder.layers.0.cross_attn.in_proj_weight", 0.0442),
    (f"{QUERY}decoder.layers.0.fc1.weight", math.sqrt(2 / (256 + 2048))),
    (f"{QUERY}decoder.mask_predictor.mask_embedder.0.0.weight", 1 / math.sqrt(3 * 256)),
    ("class_predictor.weight", 1 / math.sqrt(3 * 256)),
])  # fmt: skip
def test_weights_have_the_originals_spread(model: M2FModel, name: str, std: float) -> None:
    weight = model.state_dict()[name]
    # the spread of a sample of n values is itself uncertain by about std / sqrt(2 n)
    assert weight.std().item() == pytest.approx(std, rel=0.03 + 3 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())


@pytest.mark.parametrize("name", [
    f"{PIXEL}input_projections.0.0.bias", f"{PIXEL}mask_projection.bias",
    f"{QUERY}decoder.layers.0.self_attn.q_proj.bias",
    f"{QUERY}decoder.layers.0.self_attn.out_proj.bias", f"{QUERY}decoder.layers.0.cross_attn.in_proj_bias",
    f"{PIXEL}encoder.layers.0.self_attn.sampling_offsets.weight", f"{PIXEL}encoder.layers.0.self_attn.value_proj.bias",
])  # fmt: skip
def test_these_start_at_zero(model: M2FModel, name: str) -> None:
    assert torch.count_nonzero(model.state_dict()[name]) == 0
