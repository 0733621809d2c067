"""The pixel decoder against transformers' own, and what autograd keeps of it."""

import pytest
import torch
from torch import Tensor

from m2f_trainer.model.pixel_decoder import PixelDecoder, encoder_layer, reference_points
from tests.model.reference import feature_maps, reference_model
from tests.model.tiny import images, tiny_model


def test_a_layer_of_the_pixel_decoder_keeps_no_sum_of_features_and_positions() -> None:
    """Six arrays of the features' size: what it was given, values, what was attended, and about the two norms."""
    layer = tiny_model().train().model.pixel_level_module.decoder.encoder.layers[0]
    shapes = ((2, 2), (4, 4), (8, 8))
    hidden, positions = torch.randn(2, 84, 32, requires_grad=True), torch.randn(1, 84, 32, requires_grad=True)
    references = reference_points(shapes, hidden.device)
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoder_layer(layer, hidden, positions, references, shapes)
    assert sum(tensor.numel() == hidden.numel() for tensor in kept.values()) == 6


def test_mask_features_and_levels_are_transformers() -> None:
    model = reference_model()
    theirs = model.model.pixel_level_module.decoder
    mine = PixelDecoder(model.config, model.model.pixel_level_module.encoder.channels).eval()
    mine.load_state_dict(theirs.state_dict())
    maps = feature_maps(model)
    with torch.no_grad():
        expected, (features, levels) = theirs(maps), mine(maps)
    torch.testing.assert_close(features, expected.mask_features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(levels, list(expected.multi_scale_features), rtol=1e-4, atol=1e-4)


def test_under_autocast_the_pixel_decoder_is_within_bfloat16_of_float32() -> None:
    """Values and gradients; norms, places, attention weights and sums stay in float32, and so do the results."""
    decoder = tiny_model().train().model.pixel_level_module.decoder
    maps = [torch.randn(1, channels, side, side) for channels, side in zip((8, 16, 32, 32), (16, 8, 4, 2), strict=True)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features, levels = decoder(maps)
        assert {features.dtype, *(level.dtype for level in levels)} == {torch.float32}
        decoder.zero_grad()
        (features.square().mean() + sum(level.square().mean() for level in levels)).backward()
        gradients = {name: one.grad for name, one in decoder.named_parameters() if one.grad is not None}
        results.append((features.detach(), gradients))
    (expected, exact), (found, rounded) = results
    assert (found - expected).norm() < 0.01 * expected.norm()
    largest = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():
        assert (rounded[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-3 * largest, name


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_computes(kind: torch.dtype) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        expected = model(pixel_values=images()).masks_queries_logits
        found = model.to(kind)(pixel_values=images()).masks_queries_logits
    assert (found.float() - expected).norm() < 0.1 * expected.norm()
