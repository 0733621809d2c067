"""Checkpoints of DINOv3-Mask2former: converted models give the original's logits.

The script's classes are rewritten here from their description: a Mask2Former of transformers whose encoder is a DINOv3
and an adapter.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from m2f_trainer.hub.licences import licence_chain, licence_fields
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.model.sources import ModelError
from tests.model.published import randomize
from tests.model.tiny import HEAD, images, tiny_model

CHANNELS = [96, 192, 384, 768]
BACKBONE = "model.pixel_level_module.encoder.model."


class Adapter(nn.Module):
    """1 x 1 convolutions; with `pyramid` on maps that were brought to strides 4, 8, 16 and 32."""

    def __init__(self, width: int, pyramid: bool) -> None:
        super().__init__()
        inputs = [width // 4, width // 2, width, width] if pyramid else [width] * 4
        self.projections = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(inputs, CHANNELS, strict=True))
        self.pyramid = pyramid
        if pyramid:
            up, again = nn.ConvTranspose2d(width, width // 2, 2, 2), nn.ConvTranspose2d(width // 2, width // 4, 2, 2)
            finest = nn.Sequential(up, nn.GroupNorm(32, width // 2), nn.GELU(), again)
            second = nn.ConvTranspose2d(width, width // 2, 2, 2)
            self.resamplers = nn.ModuleList([finest, second, nn.Identity(), nn.MaxPool2d(2, 2)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if self.pyramid:
            maps = [resample(one) for resample, one in zip(self.resamplers, maps, strict=True)]
        return [project(one) for project, one in zip(self.projections, maps, strict=True)]


class Encoder(nn.Module):
    """The hidden states after the four quarters of a DINOv3; before transformers 5 the last one was normed."""

    def __init__(self, pyramid: bool, old: bool) -> None:
        super().__init__()
        config = DINOv3ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=1, intermediate_size=96, num_register_tokens=4,
            use_gated_mlp=True, hidden_act="silu",
        )  # fmt: skip
        self.model, self.adapter, self.old = DINOv3ViTModel(config), Adapter(64, pyramid), old

    def forward(self, pixels: Tensor, **_: Any) -> SimpleNamespace:
        states = list(self.model(pixels, output_hidden_states=True).hidden_states[1:])
        if self.old:
            states[-1] = self.model.norm(states[-1])
        h, w = (side // 16 for side in pixels.shape[2:])
        maps = [state[:, 5:].transpose(1, 2).unflatten(2, (h, w)) for state in states]
        return SimpleNamespace(feature_maps=self.adapter(maps))


def checkpoint(
    folder: Path, pyramid: bool = True, old: bool = False, names: dict[int, str] | None = None, **shown: Any
) -> Mask2FormerForUniversalSegmentation:
    """A checkpoint as the script writes it, and the model that it holds."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"]),
        id2label=names or {0: "cat", 1: "dog"}, **{name: value for name, value in HEAD.items() if name != "neck"},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.pixel_level_module.encoder = Encoder(pyramid, old)
    randomize(model.model.pixel_level_module.encoder)
    folder.mkdir(exist_ok=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if old:
        state = {name.replace(f"{BACKBONE}model.layer", f"{BACKBONE}layer"): one for name, one in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["Mask2FormerForUniversalSegmentation"]
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str), encoding="utf-8")
    given = {"size": {"height": 64, "width": 96}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, **shown}
    (folder / "preprocessor_config.json").write_text(json.dumps(given), encoding="utf-8")
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("pyramid", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_a_converted_checkpoint_gives_the_originals_logits(pyramid: bool, old: bool, tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "step_200_model", pyramid, old)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixel_values=pixels)
    ours = load_model(str(tmp_path / "step_200_model"))
    ours.save_pretrained(tmp_path / "converted")
    for model in (ours, load_model(str(tmp_path / "converted"))):
        found = model(pixels)
        torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.class_queries_logits, expected.class_queries_logits, atol=1e-5, rtol=1e-5)


def test_a_converted_checkpoint_knows_its_images_classes_and_licences(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    config = load_model(str(tmp_path)).config
    assert (config.image_height, config.image_width) == (64, 96)
    assert (list(config.image_mean), list(config.image_std)) == ([0.5] * 3, [0.25] * 3)
    assert config.categories == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    chain = licence_chain(config.to_dict())
    assert licence_fields(chain)["license_name"] == "dinov3-license-and-cc-by-nc-4.0"


def test_reduced_labels_get_their_ids_back_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint(tmp_path, do_reduce_labels=True)
    assert load_model(str(tmp_path)).config.categories == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert "category ids are its class numbers plus 1" in caplog.text


def test_a_class_that_shared_the_row_of_no_object_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The script took category ids as rows: of ids 1 to K, the last is the row of "no object"."""
    checkpoint(tmp_path, names={1: "cat", 2: "dog"})
    assert load_model(str(tmp_path)).config.categories == [{"id": 0, "name": "unused 0"}, {"id": 1, "name": "cat"}]
    assert "dog shared its scores" in caplog.text


@torch.no_grad()
def test_a_new_run_starts_from_a_checkpoint_of_the_script_and_keeps_its_neck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path)
    old = load_model(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing of its gated backbone is needed
    new = tiny_model("dinov3-vits16plus", init_from=str(tmp_path), image_size=(64, 96), neck="adapter").eval()
    assert new.config.neck == "script_pyramid"
    chain = licence_chain(new.config.to_dict())
    assert licence_fields(chain)["license_name"] == "dinov3-license-and-cc-by-nc-4.0"
    pixels = images(1, 64, 96)
    torch.testing.assert_close(new(pixels).masks_queries_logits, old(pixels).masks_queries_logits)


def test_a_mask2former_of_transformers_is_no_model_of_ours(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    state = {"class_predictor.bias": torch.zeros(3)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="holds a 'mask2former' model, not one of m2f_trainer's"):
        load_model(str(tmp_path))
