"""Model folders that are damaged, incomplete, absurd, or saved in half precision."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from m2f_trainer.model.backbones import load_pretrained, read_config
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.model.sources import ModelError
from m2f_trainer.model.weights import read_head
from tests.model.tiny import VIT, images, tiny_model

CLASS_HEAD = "class_predictor.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_folder_that_lacks_a_tensor_is_refused_by_its_name(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop(CLASS_HEAD))
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, such as class_predictor\.weight"):
        load_model(str(folder))


def test_a_tensor_of_another_shape_is_refused_by_its_name(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({CLASS_HEAD: torch.zeros(9, 32)}))
    with pytest.raises(ModelError, match=r"class_predictor\.weight has the shape \[9, 32\] instead of \[3, 32\]"):
        load_model(str(folder))


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_truncated_weights_are_refused(kept: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"damaged|can't be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_saved_in_half_precision_is_loaded_in_float32(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    load_model(str(folder)).to(dtype).save_pretrained(tmp_path / "half")
    half = load_model(str(tmp_path / "half"))
    assert half.dtype == torch.float32
    expected = load_model(str(folder))(images()).class_queries_logits
    torch.testing.assert_close(half(images()).class_queries_logits, expected, atol=0.1, rtol=0.1)


def test_a_backbone_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    tiny_model().encoder.backbone.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, such as norm\.weight"):
        load_pretrained(str(tmp_path), read_config(VIT))


def test_a_published_head_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "decoder_layers": 2, "encoder_layers": 1}
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(backbone_config={**swin, "out_features": stages}, num_attention_heads=2, **small)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    assert read_head(str(tmp_path)).fields["decoder_layers"] == 2
    change_weights(tmp_path, lambda tensors: tensors.pop("model.transformer_module.level_embed.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, such as model\.transformer_module\.level"):
        read_head(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"), [("decoder_layers", 10**7), ("num_queries", 10**9), ("image_height", 2**20)]
)
def test_an_absurd_number_in_a_configuration_is_refused(field: str, value: int, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ModelError, match=rf"{field} is {value}, and the limit is \d+"):
        load_model(str(folder))


def test_an_absurd_number_in_a_nested_configuration_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["backbone_config"]["num_hidden_layers"] = 10**7
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="num_hidden_layers is 10000000, and the limit is 256"):
        load_model(str(folder))


def test_an_absurd_backbone_configuration_of_a_recipe_is_refused() -> None:
    with pytest.raises(ModelError, match="num_hidden_layers is 10000000"):
        read_config({**VIT, "num_hidden_layers": 10**7})
