"""Parameter groups against a list written by hand; learning rates by step against the formulas of the schedules."""

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.model.lora import LoraSettings, set_tuning
from m2f_trainer.training.optimizer import Rates, parameter_groups, rate_factors, undecayed, with_rate_shape
from tests.model.test_families import family
from tests.model.tiny import CONVNEXT, DINOV2, VIT, tiny_model

UNDECAYED = (
    ".bias", "norm1.weight", "norm2.weight", "layernorm.weight", "layer_norm.weight", "queries_embedder.weight",
    "queries_features.weight", "level_embed", "level_embed.weight", "cls_token", "mask_token", "lambda1",
    "position_embeddings", "register_tokens", "gamma",
)  # fmt: skip
ORIGINAL = Rates(1e-4, 0.05, 0.1)


def rates(model: torch.nn.Module, settings: Rates) -> dict[str, float]:
    """Learning rate of every trainable parameter, by name."""
    of = {id(parameter): group["lr"] for group in parameter_groups(model, settings) for parameter in group["params"]}
    return {name: of[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("backbone", "side"), [(VIT, 64), (DINOV2, 56), (CONVNEXT, 64)])
def test_norms_biases_queries_levels_positions_and_layer_scale_are_not_decayed(backbone: object, side: int) -> None:
    model = tiny_model(backbone, image_size=(side, side))
    plain = undecayed(model)
    for name, _ in model.named_parameters():
        if name.endswith(UNDECAYED):
            assert name in plain, name
    for name in ("class_predictor.weight", "model.transformer_module.decoder.layers.0.fc1.weight"):
        assert name not in plain


def test_the_backbone_learns_slower_and_every_trainable_parameter_is_in_one_group() -> None:
    model = tiny_model()
    groups = parameter_groups(model, ORIGINAL)
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [
        (pytest.approx(1e-5), 0.0), (pytest.approx(1e-5), 0.05), (1e-4, 0.0), (1e-4, 0.05),
    ]  # fmt: skip
    assert groups[0]["lr"] == 1e-4, "the rate that the Trainer logs is the first group's"
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for name, rate in rates(model, ORIGINAL).items():
        assert rate == pytest.approx(1e-5 if "encoder.backbone." in name else 1e-4), name


def test_lora_factors_learn_at_the_full_rate_and_a_frozen_backbone_is_left_out() -> None:
    adapted, frozen = tiny_model(), tiny_model()
    set_tuning(adapted, "lora", LoraSettings(rank=2))
    set_tuning(frozen, "frozen")
    assert {group["lr"] for group in parameter_groups(adapted, ORIGINAL)} == {1e-4}
    assert {group["lr"] for group in parameter_groups(frozen, ORIGINAL)} == {1e-4}


@pytest.mark.parametrize(
    ("backbone", "shares"),
    [
        (VIT, {"embeddings.cls_token": 0.64, "layer.0.norm1.weight": 0.8, "layer.1.norm1.weight": 1, "norm.weight": 1}),
        (
            DINOV2,
            {"position_embeddings": 0.64, "layer.0.mlp.fc1.bias": 0.8, "layer.1.norm2.bias": 1, "layernorm.bias": 1},
        ),
        (
            CONVNEXT,
            {"stages.0.layers.0.gamma": 0.512, "stages.1.downsample_layers.1.bias": 0.64, "stages.3.layers.0.gamma": 1},
        ),
    ],
)
def test_with_layer_decay_each_layer_learns_slower_than_the_one_above(
    backbone: object, shares: dict[str, float]
) -> None:
    model = tiny_model(backbone, image_size=(56, 56) if backbone is DINOV2 else (64, 64))
    found = rates(model, Rates(1e-4, 0.05, 0.5, layer_decay=0.8))
    for ending, share in shares.items():
        (name,) = (name for name in found if "backbone." in name and name.endswith("." + ending))
        assert found[name] == pytest.approx(0.5e-4 * share), name
    assert found["class_predictor.weight"] == 1e-4
    assert min(found.values()) == pytest.approx(0.5e-4 * min(shares.values()))


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("beit", {"embeddings.cls_token": 0.64, "layers.0.lambda_1": 0.8, "layers.1.mlp.fc1.weight": 1}),
        ("pixio", {"embeddings.position_embeddings": 0.64, "layers.0.mlp.fc1.bias": 0.8, "layers.1.mlp.fc1.bias": 1}),
        (
            "resnet",
            {"embedder.embedder.convolution.weight": 0.512, "1.layers.0.layer.1.convolution.weight": 0.64},
        ),
        ("bit", {"embedder.convolution.weight": 0.512, "stages.3.layers.0.conv2.weight": 1}),
    ],
)
def test_layer_decay_knows_the_layers_of_other_families(name: str, shares: dict[str, float]) -> None:
    found = rates(tiny_model(family(name)), Rates(1e-4, 0.05, 0.5, layer_decay=0.8))
    for ending, share in shares.items():
        (parameter,) = (one for one in found if "backbone." in one and one.endswith("." + ending))
        assert found[parameter] == pytest.approx(0.5e-4 * share), parameter
    assert min(found.values()) == pytest.approx(0.5e-4 * min(shares.values()))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("convnextv2", ("grn.weight", "grn.bias")),
        ("swinv2", ("logit_scale", "continuous_position_bias_mlp.0.weight", "continuous_position_bias_mlp.2.weight")),
        ("vitdet", ("rel_pos_h", "rel_pos_w")),
    ],
)
def test_norms_and_position_biases_of_other_families_are_not_decayed(name: str, words: tuple[str, ...]) -> None:
    fields = {"use_relative_position_embeddings": True} if name == "vitdet" else {}
    model = tiny_model({**family(name), **fields}, quality_weight=2.0)
    plain = undecayed(model)
    names = [one for one, _ in model.named_parameters()]
    for word in (*words, "bias"):
        found = [one for one in names if one.endswith(word)]
        assert found
        assert plain.issuperset(found)
    matrices = [one for one, tensor in model.named_parameters() if one.startswith("quality") and tensor.ndim > 1]
    assert any(dict(model.named_parameters())[one].shape[0] == 1 for one in matrices)
    assert plain.isdisjoint(matrices), "a matrix with one output is one"


def test_layer_decay_starts_from_the_full_rate_unless_a_multiplier_is_given() -> None:
    wanted = [({}, 0.1), ({"layer_decay": 0.8}, 1.0), ({"layer_decay": 0.8, "backbone_lr_multiplier": 0.5}, 0.5)]
    for given, multiplier in wanted:
        assert TrainArguments(use_cpu=True, report_to="none", **given).backbone_lr_multiplier == multiplier  # type: ignore[arg-type]


def test_layer_decay_without_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match="layer_decay needs a backbone of layers or stages"):
        parameter_groups(torch.nn.Linear(2, 2), Rates(1e-4, 0.05, layer_decay=0.8))


STEPS = 100


def arguments(**fields: object) -> TrainArguments:
    given = {"use_cpu": True, "report_to": "none", "warmup_steps": 10, "learning_rate": 1.0, **fields}
    return TrainArguments(**given)  # type: ignore[arg-type]


def test_polynomial_cosine_and_step_have_the_values_of_their_formulas() -> None:
    warm = [0, 0.5]  # at steps 0 and 5 of a warm-up of 10
    after = (10, 55, 88, 90, 97)
    wanted = {
        "polynomial": [((100 - step) / 90) ** 0.9 for step in after],
        "cosine": [0.5 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in after],
        "step": [1, 1, 1, 0.1, 0.01],
    }
    for name, values in wanted.items():
        head, backbone = rate_factors(arguments(lr_scheduler_type=name), STEPS)
        assert [head(step) for step in (0, 5, *after)] == pytest.approx(warm + values), name
        assert [backbone(step) for step in range(STEPS)] == [head(step) for step in range(STEPS)]


@pytest.mark.parametrize("decay", [{}, {"lr_scheduler_kwargs": {"num_decay_steps": 20, "decay_type": "1-sqrt"}}])
def test_warmup_stable_decay_falls_in_the_last_fifth_of_the_run(decay: dict[str, Any]) -> None:
    head, _ = rate_factors(arguments(lr_scheduler_type="warmup_stable_decay", **decay), STEPS)
    assert [head(step) for step in (0, 5, 10, 50, 80)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert [head(step) for step in (85, 95, 100)] == pytest.approx([0.5, 1 - math.sqrt(0.75), 0])


@pytest.mark.parametrize("first", [20, 0.2])
def test_the_backbone_is_frozen_while_the_head_starts_and_then_warms_up(first: float) -> None:
    head, backbone = rate_factors(arguments(lr_scheduler_type="constant_with_warmup", head_first_steps=first), STEPS)
    assert [head(step) for step in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert [backbone(step) for step in (0, 5, 19, 20, 25, 30, 99)] == [0, 0, 0, 0, 0.5, 1, 1]


def test_a_schedule_has_the_rates_of_the_factors_and_resumes_at_any_step() -> None:
    given = arguments(lr_scheduler_type="step", lr_milestones=[0.5], head_first_steps=20)

    def make() -> LambdaLR:
        weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
        named = zip(weights, ("neck and head", "backbone"), strict=True)
        optimizer = torch.optim.SGD([{"params": [weight], "name": name} for weight, name in named], lr=1.0)
        schedule = with_rate_shape(get_scheduler(given.lr_scheduler_type, optimizer, 10, STEPS), given, STEPS)
        assert isinstance(schedule, LambdaLR)
        return schedule

    schedule = make()
    for step in range(STEPS):
        if step in (25, 60):
            saved = schedule.state_dict(), schedule.optimizer.state_dict()
            schedule = make()
            schedule.optimizer.load_state_dict(saved[1])
            schedule.load_state_dict(saved[0])
        wanted = [factor(step) for factor in rate_factors(given, STEPS)]
        assert [group["lr"] for group in schedule.optimizer.param_groups] == wanted, step
        assert schedule.get_last_lr() == wanted, step
        schedule.optimizer.step()
        schedule.step()


def test_a_schedule_without_a_shape_is_the_one_of_transformers() -> None:
    schedule = get_scheduler("cosine", torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 10, STEPS)
    assert with_rate_shape(schedule, arguments(lr_scheduler_type="cosine"), STEPS) is schedule


def test_step_is_the_originals_schedule_and_milestones_are_shares() -> None:
    assert arguments(lr_scheduler_type="step").lr_milestones == [0.889, 0.963]
    with pytest.raises(RecipeError, match=r"expected fractions of the run, between 0 and 1, got \[500\]"):
        arguments(lr_milestones=[500])
