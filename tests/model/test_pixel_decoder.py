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
        encoder_layer(layer, hidden, positions, references, shapes, recompute=True)
    assert sum(tensor.numel() == hidden.numel() for tensor in kept.values()) == 6


@pytest.mark.parametrize(
    ("recompute", "whole_layers", "runs"), [(True, False, 2), (False, False, 1), (True, True, 2), (False, True, 2)]
)
def test_feed_forward_parts_run_again_in_backward_only_where_that_is_asked_for(
    recompute: bool, whole_layers: bool, runs: int
) -> None:
    """The gradients are the same. Where whole layers are recomputed, their feed-forward parts run no third time."""
    torch.manual_seed(0)
    model = tiny_model().train()
    decoder, pixels = model.model.pixel_level_module.decoder, images() / 255
    decoder.recompute_feed_forward, results = True, []
    for settings in ((True, False), (recompute, whole_layers)):
        decoder.recompute_feed_forward = settings[0]
        if settings[1]:
            model.activation_checkpointing_enable()
        count: list[None] = []
        hook = decoder.encoder.layers[0].fc1.register_forward_hook(lambda *_, count=count: count.append(None))
        model.zero_grad()
        sum(output.square().mean() for output in model.model(pixels)).backward()
        hook.remove()
        results.append(
            (len(count), {name: one.grad.clone() for name, one in decoder.named_parameters() if one.grad is not None})
        )
    (_, expected), (found, gradients) = results
    assert found == runs
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


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
