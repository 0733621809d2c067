"""Backbones of Meta and timm, compared with modules of the published architecture and with timm itself."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from m2f_trainer.model.backbones import load_pretrained, read_config
from m2f_trainer.model.conversion import load_foreign
from m2f_trainer.model.sources import ModelError
from tests.model.published import MetaConvNeXt, MetaViT, import_timm, randomize, timm_tensors
from tests.model.tiny import tiny_model

CLOSE = {"atol": 2e-6, "rtol": 2e-6}
VITS: dict[str, dict[str, Any]] = {
    "small": {},
    "plus, with SwiGLU": {"gated": True},
    "7B, without biases of queries, keys and values": {"qkv_bias": False, "masked": False, "gated": True},
    "biases of the keys": {"masked": False},
    "satellite": {"local_norm": True},
    "patches of 16": {"patch": 16, "depth": 5},
    "one head": {"width": 64, "heads": 1, "registers": 2},
}
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def write(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


def maps_of(source: str, **options: Any) -> list[Tensor]:
    """The feature maps of the converted backbone."""
    config = read_config(source, **options)
    with torch.no_grad():
        return list(load_pretrained(source, config).eval()(IMAGES).feature_maps)


@torch.no_grad()
@pytest.mark.parametrize("fields", VITS.values(), ids=VITS.keys())
def test_a_vit_in_metas_format_gives_the_published_architectures_maps(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomize(MetaViT(**fields))
    depth = len(theirs.blocks)
    source = write(theirs.state_dict(), tmp_path / "vit.pth")
    expected = theirs(IMAGES, list(range(1, depth + 1)))
    for layers in (tuple(range(1, depth + 1)), (2,)):
        for tap, found in zip(layers, maps_of(source, taps=layers), strict=True):
            torch.testing.assert_close(found, expected[tap - 1], **CLOSE)


@torch.no_grad()
def test_a_convnext_in_metas_format_gives_the_published_architectures_maps(tmp_path: Path) -> None:
    theirs = randomize(MetaConvNeXt())
    source = write(theirs.state_dict(), tmp_path / "convnext.pth")
    for found, expected in zip(maps_of(source), theirs(IMAGES), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "plus, with SwiGLU", "7B, without biases of queries, keys and values"])
def test_a_vit_in_timms_format_gives_the_published_architectures_maps(name: str, tmp_path: Path) -> None:
    theirs = randomize(MetaViT(**VITS[name]))
    write(timm_tensors(theirs.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": {}}')
    expected = theirs(IMAGES, [1, 2, 3, 4])
    for source in (str(tmp_path), str(tmp_path / "model.safetensors")):
        for one, other in zip(maps_of(source), expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@torch.no_grad()
def test_a_convnext_in_timms_format_gives_the_published_architectures_maps(tmp_path: Path) -> None:
    theirs = randomize(MetaConvNeXt())
    source = write(timm_tensors(theirs.state_dict()), tmp_path / "model.safetensors")
    for found, expected in zip(maps_of(source), theirs(IMAGES), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


TIMM_VITS = [
    "vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3",
    "vit_small_plus_patch16_dinov3_qkvb", "vit_7b_patch16_dinov3", "vit_small_patch16_lingbot",
    "vit_giant_patch16_lingbot",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM_VITS)
def test_timms_own_vits_convert_with_equal_maps(name: str, tmp_path: Path) -> None:
    timm = import_timm()
    size = {} if "tiny" in name or "small" in name else {"embed_dim": 128, "num_heads": 2}
    theirs = randomize(timm.create_model(name, depth=3, **size))
    source = write(theirs.state_dict(), tmp_path / "model.safetensors")
    expected = theirs.forward_intermediates(IMAGES, indices=[0, 1, 2], norm=True, intermediates_only=True)
    for found, other in zip(maps_of(source, taps=(1, 2, 3)), expected, strict=True):
        torch.testing.assert_close(found, other, **CLOSE)


@torch.no_grad()
def test_timms_own_convnext_converts_with_equal_maps(tmp_path: Path) -> None:
    theirs = randomize(import_timm().create_model("convnext_tiny", num_classes=0, dims=(8, 16, 24, 32)))
    source = write(theirs.state_dict(), tmp_path / "model.safetensors")
    expected = theirs.forward_intermediates(IMAGES, intermediates_only=True)
    for found, other in zip(maps_of(source), expected, strict=True):
        torch.testing.assert_close(found, other, **CLOSE)


def test_the_names_that_these_tests_use_for_timm_are_timms_own() -> None:
    timm = import_timm()
    from timm.models import convnext, eva  # type: ignore[import-not-found]

    vit = randomize(MetaViT(width=384, heads=6, depth=1, inner=1536, patch=16, gated=True))
    model = timm.create_model("vit_small_plus_patch16_dinov3_qkvb", depth=1)
    assert timm_tensors(vit.state_dict()).keys() == eva.checkpoint_filter_fn(vit.state_dict(), model).keys()
    stages = randomize(MetaConvNeXt())
    theirs = timm.create_model("convnext_tiny", num_classes=0, dims=(8, 16, 24, 32), depths=(1, 2, 3, 1))
    assert timm_tensors(stages.state_dict()).keys() == convnext.checkpoint_filter_fn(stages.state_dict(), theirs).keys()


def test_a_run_starts_from_metas_file_and_remembers_its_path(tmp_path: Path) -> None:
    theirs = randomize(MetaViT())
    source = write(theirs.state_dict(), tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    model = tiny_model(source)
    assert model.config.backbone_name == source
    query = model.encoder.backbone.state_dict()["model.layer.1.attention.q_proj.weight"]
    assert torch.equal(query, theirs.blocks[1].attn.qkv.weight[:128])


class Harmful:
    """Would run a command when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"model": state}, "holds no plain dictionary of tensors"),
        (lambda state: {**state, "note": Harmful()}, "holds Python objects, which are never run"),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 5, 128)}, "1 of its tensors .* such as pos_embed"),
        (lambda state: {"conv1.weight": torch.zeros(1)}, "no backbone of a known format: .* conv1.weight"),
        (lambda state: {n: t for n, t in state.items() if n != "cls_token"}, "lacks|missing"),
        (lambda state: {n: t for n, t in state.items() if n != "norm.bias"}, r"1 tensors are missing .* norm\.bias"),
        (lambda state: {n: t for n, t in state.items() if "proj" not in n}, "lacks the tensor"),
        (lambda state: {**state, "rope_embed.periods": torch.arange(16.0)}, "other periods"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(change(MetaViT().state_dict()), tmp_path / "vit.pth")
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_pretrained(source, read_config(source))
    assert not Path("harm").exists()


@pytest.mark.parametrize("name", ["vit.pth", "model.safetensors"])
def test_truncated_and_missing_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(ModelError, match=f"there is no file .*{name}"):
        read_config(str(path))
    write(MetaViT().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged"):
        read_config(str(path))


def test_bfloat16_files_are_converted_in_float32_and_shapes_alone_need_no_weights(tmp_path: Path) -> None:
    half = MetaViT().to(torch.bfloat16).state_dict()
    source = Path(write(half, tmp_path / "vit.pth"))
    fields, tensors = load_foreign(source, "meta")
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert load_foreign(source)[0] == fields
    assert {tensor.dtype for tensor in load_foreign(source)[1].values()} == {torch.float32}
