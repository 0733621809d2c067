"""The encoder: inputs of its necks, gradients of its backbone, and randomness in training."""

import pytest
import torch

from m2f_trainer.model import encoder
from m2f_trainer.model.encoder import AdapterPyramid, ChannelNorm
from m2f_trainer.model.mask2former import M2FModel, load_model
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


@pytest.mark.parametrize("neck", ["pyramid", "adapter", "plain"])
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


def outputs(model: M2FModel, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixels).masks_queries_logits


def test_the_adapter_neck_sees_details_inside_a_patch_and_the_pyramid_does_not() -> None:
    pixels = images(1)
    swapped = pixels.clone()
    swapped[..., :8, :8] = pixels[..., :8, :8].flip(-1)
    differ = {}
    for neck in ("pyramid", "adapter"):
        model = tiny_model(neck=neck)
        for parameter in model.encoder.backbone.parameters():
            torch.nn.init.zeros_(parameter)
        differ[neck] = not torch.equal(outputs(model, pixels), outputs(model, swapped))
    assert differ == {"pyramid": False, "adapter": True}


def test_in_bfloat16_the_neck_s_norms_learn_as_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 16, 96, 96, generator=generator).bfloat16()
    wanted = torch.randn(2, 16, 96, 96, generator=generator) + 0.01
    gradients = []
    for kind in (torch.float32, torch.float64):
        norm = ChannelNorm(16).to(kind)
        features = maps if kind == torch.float32 else maps.double()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.float32):
            (norm(features) * wanted.to(kind)).sum().backward()
        gradients.append(torch.cat([parameter.grad.double() for parameter in norm.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0.05)


def test_the_pyramid_halves_each_map_from_a_quarter_of_the_patch_to_twice_it() -> None:
    encoder = tiny_model().encoder
    assert [tuple(one.shape) for one in encoder(torch.randn(1, 3, 64, 96))] == [
        (1, 8, 32, 48), (1, 16, 16, 24), (1, 32, 8, 12), (1, 32, 4, 6),
    ]  # fmt: skip


def test_the_norm_of_a_map_is_torchs_over_the_channels_of_each_position() -> None:
    norm, maps = ChannelNorm(8), torch.randn(2, 8, 3, 5)
    with torch.no_grad():
        norm.norm.weight.uniform_()
        norm.norm.bias.uniform_()
        for y, x in ((0, 0), (2, 4)):
            expected = torch.nn.functional.layer_norm(maps[:, :, y, x], (8,), norm.norm.weight, norm.norm.bias)
            torch.testing.assert_close(norm(maps)[:, :, y, x], expected)


def test_maps_on_a_cpu_are_stored_channels_last_which_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    neck = AdapterPyramid(32, 2, [8, 16, 24, 32]).double()
    taps, pixels = [torch.randn(2, 32, 6, 4).double() for _ in range(2)], torch.randn(2, 3, 84, 56).double()

    def gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        maps = neck(taps, pixels)
        return maps, list(torch.autograd.grad(sum(one.square().sum() for one in maps), list(neck.parameters())))

    maps, found = gradients()
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in maps)
    monkeypatch.setattr(encoder, "channels_last", lambda one: one)
    plain, expected = gradients()
    torch.testing.assert_close([*maps, *found], [*plain, *expected])
