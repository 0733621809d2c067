"""Necks: sizes of their maps, what they see of the image, and the formulas of their layers."""

import pytest
import torch
import torch.nn.functional as F

from m2f_trainer.config.arguments import HEADS
from m2f_trainer.model import neck
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.model.neck import AdapterPyramid, ChannelNorm, ConvBlock, TopDown, TopDownPyramid
from tests.model.tiny import CONVNEXT, images, tiny_model


def outputs(model: M2FModel, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixels).masks_queries_logits


def test_necks_with_a_stem_see_details_inside_a_patch_and_the_pyramid_does_not() -> None:
    pixels = images(1)
    swapped = pixels.clone()
    swapped[..., :8, :8] = pixels[..., :8, :8].flip(-1)
    differ = {}
    for name in ("pyramid", "adapter", "top_down"):
        model = tiny_model(neck=name)
        for parameter in model.encoder.backbone.parameters():
            torch.nn.init.zeros_(parameter)
        differ[name] = not torch.equal(outputs(model, pixels), outputs(model, swapped))
    assert differ == {"pyramid": False, "adapter": True, "top_down": True}


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


@pytest.mark.parametrize("name", ["pyramid", "top_down"])
def test_each_map_has_half_the_size_of_the_one_before_from_a_quarter_of_the_patch_to_twice_it(name: str) -> None:
    encoder = tiny_model(neck=name).encoder
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


@pytest.mark.parametrize("kind", [AdapterPyramid, TopDownPyramid])
def test_maps_on_a_cpu_are_stored_channels_last_which_changes_no_gradient(
    kind: type[AdapterPyramid] | type[TopDownPyramid], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    made = kind(32, 2, [8, 16, 24, 32]).double()
    taps, pixels = [torch.randn(2, 32, 6, 4).double() for _ in range(2)], torch.randn(2, 3, 84, 56).double()

    def gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        maps = made(taps, pixels)
        return maps, list(torch.autograd.grad(sum(one.square().sum() for one in maps), list(made.parameters())))

    maps, found = gradients()
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in maps)
    monkeypatch.setattr(neck, "channels_last", lambda one: one)
    plain, expected = gradients()
    torch.testing.assert_close([*maps, *found], [*plain, *expected])


def test_a_block_adds_two_convolutions_with_a_norm_over_channels_between_them() -> None:
    torch.manual_seed(0)
    block, features = ConvBlock(6).double(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    inner = F.conv2d(features, block.inner.weight, padding=1)
    centred = inner - inner.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + block.norm.norm.eps).sqrt()
    expected = features + F.conv2d(F.gelu(normed), block.outer.weight, block.outer.bias, padding=1)
    torch.testing.assert_close(block(features), expected)


def test_each_map_gets_the_next_coarser_one_before_its_block() -> None:
    pathway = TopDown([1, 1, 1])
    for block in pathway.blocks:  # then a block adds 10
        torch.nn.init.zeros_(block.outer.weight)
        torch.nn.init.constant_(block.outer.bias, 10.0)
    for width in pathway.widths:  # then the coarser map counts twice
        torch.nn.init.constant_(width.weight, 2.0)
        torch.nn.init.zeros_(width.bias)
    maps = [torch.full((1, 1, side, side), value) for side, value in ((8, 3.0), (4, 2.0), (2, 1.0))]
    done = pathway(maps)
    assert [tuple(one.shape) for one in done] == [(1, 1, 8, 8), (1, 1, 4, 4), (1, 1, 2, 2)]
    assert [one.unique().tolist() for one in done] == [[81.0], [34.0], [11.0]]


@pytest.mark.parametrize(("head", "joined"), [("original", False), ("light", True), ("tiny", True)])
def test_small_heads_join_maps_by_convolutions_instead_of_deformable_attention(head: str, joined: bool) -> None:
    names = set(tiny_model(**HEADS[head]).state_dict())
    assert any(".top_down." in name for name in names) is joined
    assert any("sampling_offsets" in name for name in names) is not joined


def test_stages_of_a_convnext_are_joined_in_the_widths_of_the_neck() -> None:
    encoder = tiny_model(CONVNEXT, neck="top_down", neck_channels=[8, 8, 16, 16]).encoder
    before = encoder(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert [tuple(one.shape) for one in before] == [(1, 8, 16, 16), (1, 8, 8, 8), (1, 16, 4, 4), (1, 16, 2, 2)]
    encoder.neck.top_down.blocks[-1].outer.bias.data += 1
    after = encoder(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, False, False]
