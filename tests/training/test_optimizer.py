"""Parameter groups against a list written by hand."""

import pytest

from m2f_trainer.model.adapters import LoraSettings, set_tuning
from m2f_trainer.training.optimizer import parameter_groups, undecayed
from tests.model.tiny import tiny_model

UNDECAYED = (
    ".bias", "norm1.weight", "norm2.weight", "layernorm.weight", "layer_norm.weight", "queries_embedder.weight",
    "queries_features.weight", "level_embed", "level_embed.weight", "cls_token", "mask_token", "lambda1",
)  # fmt: skip


def test_norms_biases_queries_levels_positions_and_layer_scale_are_not_decayed() -> None:
    model = tiny_model()
    plain = undecayed(model)
    for name, _ in model.named_parameters():
        if name.endswith(UNDECAYED):
            assert name in plain, name
    for name in ("class_predictor.weight", "model.transformer_module.decoder.layers.0.fc1.weight"):
        assert name not in plain


def test_the_backbone_learns_slower_and_every_trainable_parameter_is_in_one_group() -> None:
    model = tiny_model()
    groups = parameter_groups(model, 1e-4, 0.05, 0.1)
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [
        (pytest.approx(1e-5), 0.0), (pytest.approx(1e-5), 0.05), (1e-4, 0.0), (1e-4, 0.05),
    ]  # fmt: skip
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1e-5 if "encoder.backbone." in name else 1e-4), name


def test_lora_factors_learn_at_the_full_rate_and_a_frozen_backbone_is_left_out() -> None:
    adapted, frozen = tiny_model(), tiny_model()
    set_tuning(adapted, "lora", LoraSettings(rank=2))
    set_tuning(frozen, "frozen")
    assert {group["lr"] for group in parameter_groups(adapted, 1e-4, 0.05, 0.1)} == {1e-4}
    assert {group["lr"] for group in parameter_groups(frozen, 1e-4, 0.05, 0.1)} == {1e-4}
