"""The encoder: inputs of its neck, gradients of its backbone, and randomness in training."""

import pytest
import torch

from m2f_trainer.model.mask2former import load_model
from tests.model.tiny import CONVNEXT, DINOV2, VIT, images, tiny_model

DEEP = {"num_hidden_layers": 3}


@pytest.mark.parametrize("backbone", [{**VIT, **DEEP}, {**DINOV2, **DEEP}, CONVNEXT])
def test_drop_path_rises_from_the_first_layer_to_the_last_also_after_loading(backbone, tmp_path) -> None:  # type: ignore[no-untyped-def]
    side = 56 if "mlp_ratio" in backbone else 64
    model = tiny_model(backbone, image_size=(side, side), drop_path=0.2)
    model.save_pretrained(tmp_path)
    for one in (model, load_model(str(tmp_path))):
        drops = [module for name, module in one.encoder.backbone.named_modules() if name.endswith(".drop_path")]
        rates = [0.0 if isinstance(drop, torch.nn.Identity) else drop.drop_prob for drop in drops]
        assert rates == pytest.approx([0.2 * k / (len(drops) - 1) for k in range(len(drops))])


def features(model, seed: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    with torch.no_grad():
        (*_, found) = model.encoder.backbone(images(1) / 255).feature_maps
    return found  # type: ignore[no-any-return]


def test_a_training_backbone_is_random_only_where_that_was_asked_for() -> None:
    for noise, is_random in (({}, False), ({"rope_rescale": 2.0}, True), ({"drop_path": 0.5}, True)):
        model = tiny_model({**VIT, "pos_embed_shift": 0.5, "pos_embed_jitter": 1.5}, **noise).train()
        assert (len({features(model, seed).sum().item() for seed in range(8)}) > 1) == is_random, noise
        model.encoder.backbone.requires_grad_(False)
        model.train()
        assert torch.equal(features(model, 0), features(model, 1)), "a frozen backbone never is"


@pytest.mark.parametrize("neck", ["pyramid", "adapter", "top_down", "plain"])
@pytest.mark.parametrize("backbone", [VIT, DINOV2])
def test_a_frozen_backbone_keeps_no_graph_and_the_neck_learns_from_all_its_taps(backbone, neck: str) -> None:  # type: ignore[no-untyped-def]
    side = 56 if backbone is DINOV2 else 64
    encoder = tiny_model(backbone, image_size=(side, side), taps=(1, 2), neck=neck).train().encoder
    encoder.backbone.requires_grad_(False)
    seen: list[torch.Tensor] = []
    encoder.neck.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    maps = encoder(torch.randn(1, 3, side, side))
    assert [tensor.requires_grad for tensor in seen] == [False, False]
    if neck != "plain":  # which has no parameters
        sum(one.mean() for one in maps).backward()
        assert all(parameter.grad is not None for parameter in encoder.neck.parameters())
        both = encoder.neck.fuse.weight.grad.abs().sum((0, 2, 3))
        assert (both.view(2, -1).sum(1) > 0).all()
