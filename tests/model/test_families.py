"""Every family of backbones of transformers: trained, saved, loaded and exported, or refused with the reason."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoBackbone

from m2f_trainer.errors import ModelFolderError
from m2f_trainer.export.export import ONE_SIZE as ONE_EXPORTED_SIZE
from m2f_trainer.export.export import export_model, symbolic_sizes
from m2f_trainer.export.parity import FULL, check_export
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.model.backbones import ModelError, feature_maps, read_config
from m2f_trainer.model.mask2former import load_model
from tests.model.tiny import images, labels, tiny_model

FOUR = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]}
WINDOWS = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": 64}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 16,
    "image_size": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "dinov3_vit": VIT,
    "dinov3_convnext": FOUR,
    "dinov2": VIT,
    "dinov2_with_registers": VIT,
    "swin": {**WINDOWS, "window_size": 4},
    "swinv2": {**WINDOWS, "window_size": 4},
    "hiera": WINDOWS | {"image_size": [64, 64]},
    "convnext": FOUR,
    "convnextv2": FOUR,
    "resnet": {**FOUR, "embedding_size": 8, "layer_type": "basic"},
    "bit": {**FOUR, "embedding_size": 8, "num_groups": 2},
    "pvt_v2": {**FOUR, "num_attention_heads": [1, 1, 2, 2]},
    "vitdet": {**VIT, "pretrain_image_size": 64},
    "beit": {**VIT, "use_relative_position_bias": True},
    "pixio": VIT,
}
ONE_SIZE = {"hiera"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "radio": ({}, "not a backbone of transformers"),
    "timm_wrapper": ({}, "not a backbone of transformers"),
    "timm_backbone": ({"backbone": "resnet18"}, "needs the package timm wherever the model is used"),
    "dinat": ({}, "requires the natten library"),
    "focalnet": (
        {**WINDOWS, **FOUR, "focal_levels": [1] * 4, "focal_windows": [3] * 4},
        "gives feature maps of the strides [8, 16, 32]",
    ),
}


def family(name: str) -> dict[str, Any]:
    return {"model_type": name, **FAMILIES[name]}


def table() -> str:
    """The table of recipes/README.md, made from the configurations of this file."""
    rows = ["| family | strides of its maps | image sizes | exported files |", "|---|---|---|---|"]
    for name in FAMILIES:
        strides = [one.stride for one in feature_maps(read_config(family(name)))]
        shape = ", ".join(map(str, strides)) if len(set(strides)) > 1 else "that of its patches (a ViT)"
        sizes = "that of its configuration" if name in ONE_SIZE else "any multiple of the largest stride"
        exported = "`--fixed_size`" if name in ONE_EXPORTED_SIZE else "any size"
        rows.append(f"| `{name}` | {shape} | {sizes} | {exported} |")
    for name, (_, reason) in REFUSED.items():
        rows.append(f"| `{name}` | refused: {reason} | | |")
    return "\n".join(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_two_steps_is_saved_and_predicts_the_same_when_loaded(name: str, tmp_path: Path) -> None:
    model = tiny_model(family(name), decoder_layers=2).train()
    backbone = {key: tensor.clone() for key, tensor in model.encoder.backbone.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(images(), **labels()).loss
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    trained = [key for key, tensor in model.encoder.backbone.named_parameters() if not tensor.equal(backbone[key])]
    assert len(trained) > 0.8 * len(backbone)
    model.eval().save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(images()).masks_queries_logits, model(images()).masks_queries_logits)
    photo = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    first, second = (Predictor(one)(photo)[0].scores for one in (model, again))
    assert np.array_equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_maps_of_a_family_are_those_of_transformers_with_its_own_attention(name: str) -> None:
    encoder = tiny_model(family(name)).eval().encoder
    theirs = AutoBackbone.from_config(read_config(family(name)), attn_implementation="eager").eval()
    theirs.load_state_dict(encoder.backbone.state_dict())
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for found, expected in zip(encoder.backbone_features(pixels), theirs(pixels).feature_maps, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_onnx_file_equals_the_model_at_the_sizes_of_the_table(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    fixed = name in ONE_EXPORTED_SIZE
    model = tiny_model(family(name), decoder_layers=2, image_size=(64, 64) if name in ONE_SIZE else (128, 128)).eval()
    path = export_model(model, "onnx", tmp_path, fixed_size=fixed)
    found = check_export(model, path, None, 4, FULL, fixed_size=fixed)
    assert found.met, found.to_text()
    assert found.mask_logits < 1e-3
    if found.other_size is not None:
        assert found.other_size < 1e-3


@pytest.mark.parametrize("name", ONE_EXPORTED_SIZE)
def test_an_export_for_any_size_is_refused_with_the_way_out_where_it_is_not_possible(name: str, tmp_path: Path) -> None:
    model = tiny_model(family(name), decoder_layers=2, image_size=(64, 64) if name in ONE_SIZE else (128, 128)).eval()
    with pytest.raises(ModelFolderError, match=f"(?s){name}.*Export it with --fixed_size"):
        export_model(model, "torch", tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_used_is_refused_by_name(name: str) -> None:
    fields, reason = REFUSED[name]
    with pytest.raises(ModelError, match=f"(?s){name}.*{re.escape(reason)}"):
        read_config({"model_type": name, **fields})


@pytest.mark.parametrize("name", sorted(ONE_SIZE))
def test_a_frame_that_a_backbone_does_not_take_is_refused_before_training(name: str) -> None:
    with pytest.raises(
        ModelError, match=f"a '{name}' backbone of this configuration can't be run on images of 96 x 64"
    ):
        tiny_model(family(name), image_size=(96, 64))


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - ONE_SIZE))
def test_other_families_take_frames_of_any_multiple_of_their_stride(name: str) -> None:
    tiny_model(family(name), image_size=(96, 64))


def test_batch_norms_keep_their_pretrained_statistics_in_training() -> None:
    model = tiny_model(family("resnet")).train()
    before = {key: tensor.clone() for key, tensor in model.encoder.backbone.named_buffers()}
    model(images(), **labels())
    assert all(tensor.equal(before[key]) for key, tensor in model.encoder.backbone.named_buffers())


def test_the_published_table_of_families_is_what_these_tests_find() -> None:
    page = Path(__file__).parents[2].joinpath("recipes", "README.md").read_text(encoding="utf-8")
    assert table() in page


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "vitdet"])
def test_a_traced_vit_takes_the_size_of_its_pretraining_and_others(name: str) -> None:
    backbone = AutoBackbone.from_config(read_config(family(name))).eval()
    free = {2: 16 * torch.export.Dim("rows", min=4, max=64), 3: 16 * torch.export.Dim("columns", min=4, max=64)}
    with symbolic_sizes(backbone):
        program = torch.export.export(backbone, (torch.randn(1, 3, 96, 112),), dynamic_shapes=(free,), strict=False)
    assert not torch.jit.is_tracing()
    for height, width in ((64, 64), (80, 128)):
        pixels = torch.randn(1, 3, height, width)
        found, expected = program.module()(pixels).feature_maps, backbone(pixels).feature_maps
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
