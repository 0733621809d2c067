"""Random operations of a backbone in training: only those that were configured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoBackbone

from m2f_trainer.model.backbones import ModelError, load_pretrained, read_config
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
