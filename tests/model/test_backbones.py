"""Random operations of a backbone in training: only those that were configured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoBackbone

from m2f_trainer.model.backbones import BACKBONES, ModelError, find_row, load_pretrained, normalization_of, read_config
from tests.model.tiny import DINOV2, VIT, images


@pytest.mark.parametrize(("layers", "read"), [(12, [3, 6, 9, 12]), (24, [6, 12, 18, 24]), (5, [2, 3, 4, 5]), (1, [1])])
def test_the_neck_reads_the_end_of_each_quarter_of_a_vit_by_default(layers: int, read: list[int]) -> None:
    vit = {**VIT, "num_hidden_layers": layers}
    assert read_config(vit).out_features == [f"stage{layer}" for layer in read]
    assert read_config(vit, taps=(layers,)).out_features == [f"stage{layers}"]


@pytest.mark.parametrize("fields", [{**VIT, "num_hidden_layers": 4}, {**DINOV2, "num_hidden_layers": 4}])
@pytest.mark.parametrize("taps", [(1,), (1, 2, 3), (2, 4)])
def test_layers_after_the_last_tap_are_left_out_and_the_maps_stay_the_same(
    fields: dict[str, Any], taps: tuple[int, ...], tmp_path: Path
) -> None:
    whole = AutoBackbone.from_config(read_config(fields)).eval()
    whole.save_pretrained(tmp_path)
    cut = load_pretrained(str(tmp_path), read_config(str(tmp_path), taps=taps)).eval()
    assert len(cut.state_dict()) < len(whole.state_dict()) or taps[-1] == 4
    pictures = images(1, 56) / 255
    with torch.no_grad():
        every = whole(pictures, output_hidden_states=True).hidden_states
        for tap, found in zip(taps, cut(pictures).feature_maps, strict=True):
            tokens = whole.norm(every[tap]) if hasattr(whole, "norm") else whole.layernorm(every[tap])
            torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens[:, -found[0, 0].numel() :])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "dinov4"}, r"Unrecognized model identifier: dinov4$"),
        ({"model_type": "dinov2", "hidden_size": "wide"}, r"hidden_size"),
    ],
)
def test_a_backbone_configuration_that_transformers_does_not_take_is_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=rf"(?s)transformers rejects this backbone configuration: .*{message}"):
        read_config(fields)


def test_layers_are_not_chosen_of_a_backbone_that_gives_its_stages() -> None:
    fields = {"model_type": "dinov3_convnext"}
    assert read_config(fields).out_features == ["stage1", "stage2", "stage3", "stage4"]
    with pytest.raises(ModelError, match="four stages"):
        read_config(fields, taps=(3, 6))


def test_noise_that_a_backbone_does_not_have_is_refused() -> None:
    with pytest.raises(ModelError, match="'dinov2' backbone has no pos_embed_rescale, so it can't be set to 2"):
        read_config(DINOV2, rope_rescale=2.0)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SATELLITE_MEAN, SATELLITE_STD = (0.43, 0.411, 0.296), (0.213, 0.156, 0.143)


@pytest.mark.parametrize("name", BACKBONES)
def test_each_backbone_of_the_table_has_the_normalisation_it_was_trained_with(name: str) -> None:
    """DINOv3's satellite weights have their own; all others were trained with ImageNet's."""
    expected = (SATELLITE_MEAN, SATELLITE_STD) if "sat493m" in name else (IMAGENET_MEAN, IMAGENET_STD)
    row = BACKBONES[name]
    for alias in (name, row.hub_id, *([row.ungated, f"/home/a/{row.file}-8aa4cbdd.pth"] if row.file else [])):
        assert normalization_of(alias) == expected


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("facebook/dinov3-vits16plus-pretrain-lvd1689m", "dinov3-vits16plus"),
        ("timm/vit_small_plus_patch16_dinov3.lvd1689m", "dinov3-vits16plus"),
        ("timm/vit_small_plus_patch16_dinov3_qkvb.lvd1689m", "dinov3-vits16plus"),
        ("timm/vit_large_patch16_dinov3.sat493m", "dinov3-vitl16-sat493m"),
        ("/home/a/dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth", "dinov3-vits16plus"),
        ("/home/a/dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "dinov3-vits16"),
        ("/models/dinov3-convnext-tiny-pretrain-lvd1689m", "dinov3-convnext-tiny"),
        ("timm/vit_small_patch16_dinov3_qkvb.eupe_lvd1689m", "eupe-vits16"),
        ("someone/dinov3-vits16-pretrain-lvd1689m", None),
        ("/home/dinov2-small/mine", None),
    ],
)
def test_published_names_of_the_same_weights_are_one_row(alias: str, name: str | None) -> None:
    assert find_row(alias) == (BACKBONES[name] if name else None)


def write_backbone(folder: Path, name: str, fields: dict[str, Any]) -> str:
    """A folder with a configuration of transformers and another file."""
    (folder / "config.json").write_text(json.dumps(VIT), encoding="utf-8")
    (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, ((0.5,) * 3, (0.25,) * 3)),
        ({"image_mean": [127.5] * 3, "image_std": [51] * 3, "do_rescale": False}, ((0.5,) * 3, (0.2,) * 3)),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}, ((0.25,) * 3, (0.25,) * 3)),
        ({"size": 224}, (IMAGENET_MEAN, IMAGENET_STD)),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, (IMAGENET_MEAN, IMAGENET_STD)),
    ],
)
def test_a_folder_states_its_normalisation_in_its_preprocessor_configuration(
    fields: dict[str, Any], expected: tuple[tuple[float, ...], tuple[float, ...]], tmp_path: Path
) -> None:
    found = normalization_of(write_backbone(tmp_path, "preprocessor_config.json", fields))
    assert found == (pytest.approx(expected[0]), pytest.approx(expected[1]))


@pytest.mark.parametrize("std", [[0.5, 0.5], [0.5, 0.5, 0], "wide", [0.5, None, 0.5], [0.5, 0.5, float("nan")]])
def test_a_normalisation_that_cannot_be_used_is_refused(std: object, tmp_path: Path) -> None:
    source = write_backbone(tmp_path, "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": std})
    with pytest.raises(ModelError, match=r"expected three numbers each.*Correct its preprocessor_config\.json"):
        normalization_of(source)
