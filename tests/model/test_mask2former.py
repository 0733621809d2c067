"""The assembled model: what it computes, saves, loads and starts from."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForUniversalSegmentation

from m2f_trainer.model.backbones import ModelError
from m2f_trainer.model.lora import set_tuning
from m2f_trainer.model.mask2former import M2FModel, load_model
from tests.model.tiny import CONVNEXT, DINOV2, VIT, images, labels, tiny_model


def outputs(model: M2FModel, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixels).masks_queries_logits


@pytest.mark.parametrize(
    ("backbone", "neck", "size", "shape"),
    [
        (VIT, "pyramid", (64, 96), (32, 48)),
        (VIT, "plain", (64, 96), (8, 12)),
        (VIT, "adapter", (64, 96), (32, 48)),
        (DINOV2, "adapter", (56, 70), (16, 20)),
        (CONVNEXT, "pyramid", (64, 96), (16, 24)),
        (DINOV2, "pyramid", (56, 70), (16, 20)),
    ],
)
def test_every_backbone_gives_masks_at_its_finest_stride(backbone, neck, size, shape) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model(backbone, neck=neck, image_size=size)
    assert outputs(model, images(2, *size)).shape == (2, 7, *shape)


BODIES = [
    *((VIT, neck, taps) for neck in ("pyramid", "adapter") for taps in ((1,), (2,), (1, 2))),
    (VIT, "plain", (1, 2)),
    (VIT, "top_down", (1, 2)),
    (CONVNEXT, "top_down", ()),
    (DINOV2, "adapter", (1,)),
    (CONVNEXT, "pyramid", ()),
]
LOSSES = {"quality_weight": 2.0, "matrix_nms": True, "discrimination_weight": 5.0}
HEADS = [
    {"encoder_layers": 2, "decoder_layers": 3},
    *({"encoder_layers": encoder, "decoder_layers": decoder, **LOSSES} for encoder in (0, 1) for decoder in (1, 2)),
]


@pytest.mark.parametrize("objects", [True, False], ids=["objects", "none"])
@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
@pytest.mark.parametrize(("backbone", "neck", "taps"), BODIES)
def test_every_trainable_parameter_gets_a_gradient(
    backbone: dict[str, Any], neck: str, taps: tuple[int, ...], tune: str, objects: bool
) -> None:
    """With every configuration of the head, also without any object; DDP stops at the second step otherwise."""
    if tune == "lora" and backbone == CONVNEXT:
        pytest.skip("a ConvNeXt has no attention layers for LoRA")
    side = 56 if backbone == DINOV2 else 64
    for head in HEADS:
        model = tiny_model(backbone, taps=taps, neck=neck, image_size=(side, side), **head)
        set_tuning(model, tune)
        targets = labels(side, side) if objects else {
            "mask_labels": [torch.zeros(0, side, side)] * 2, "class_labels": [torch.zeros(0, dtype=torch.long)] * 2
        }  # fmt: skip
        model.train()(images(2, side, side), **targets).loss.backward()
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        assert [name for name, one in trained.items() if one.grad is None] == [], head


def test_uint8_pixels_are_normalised_as_the_processor_would_and_padding_is_zero() -> None:
    model = tiny_model()
    pixels = images()
    mask = torch.ones(2, 64, 64, dtype=torch.bool)
    mask[:, 40:] = False
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (pixels / 255 - mean) / std
    expected[:, :, 40:] = 0
    torch.testing.assert_close(model.normalise(pixels, mask), expected)
    torch.testing.assert_close(outputs(model, expected), outputs(model, expected.clone()))


def test_a_saved_model_loads_with_equal_outputs_by_us_and_by_the_auto_class(tmp_path: Path) -> None:
    model = tiny_model()
    expected = outputs(model, images())
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load_model(str(tmp_path)), images()), expected)
    assert torch.equal(outputs(AutoModelForUniversalSegmentation.from_pretrained(tmp_path), images()), expected)
    assert load_model(str(tmp_path)).config.categories == [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}]


def test_a_saved_state_loads_in_place_under_the_names_the_modules_have(tmp_path: Path) -> None:
    """transformers' default renames a DINOv3 backbone on saving, and a resumed Trainer would skip it in silence."""
    from safetensors.torch import load_file

    model = tiny_model()
    model.save_pretrained(tmp_path)
    result = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == []


LOAD_ELSEWHERE = """
import sys, torch
from transformers import AutoModelForUniversalSegmentation
model = AutoModelForUniversalSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert not any(name.startswith("m2f_trainer") for name in sys.modules), "the package was imported"
pixels = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(pixels).masks_queries_logits, sys.argv[3])
"""


def test_a_saved_folder_carries_its_code_to_a_process_without_the_package(tmp_path: Path) -> None:
    model = tiny_model()
    folder, pixels, result = tmp_path / "model", tmp_path / "pixels.pt", tmp_path / "masks.pt"
    model.save_pretrained(folder)
    torch.save(images(), pixels)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD_ELSEWHERE, *map(str, (folder, pixels, result))]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=280)
    assert torch.equal(torch.load(result), outputs(model, images()))


def test_gradient_checkpointing_changes_memory_and_not_gradients() -> None:
    model = tiny_model().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        model.zero_grad()
        model(images(), **labels()).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_folder_without_a_model_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model could be read"):
        load_model(str(tmp_path))
