"""Starting from a published head or from a model of ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from m2f_trainer.model.backbones import ModelError
from m2f_trainer.model.build import build_model
from m2f_trainer.model.weights import load_head
from tests.model.tiny import CATEGORIES, DINOV2, HEAD, VIT, tiny_model


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers Mask2Former on a tiny Swin, as the published ones are."""
    folder = tmp_path_factory.mktemp("head")
    names = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64, out_features=names)
    torch.manual_seed(5)
    fields = {**HEAD, "num_queries": 11}
    Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin, num_labels=2, **fields)
    ).save_pretrained(folder)
    return folder


def test_the_pyramid_takes_the_heads_channels_so_that_every_head_tensor_loads(head: Path) -> None:
    model = build_model(VIT, CATEGORIES, image_size=(64, 64), head_checkpoint=str(head))
    assert model.config.num_queries == 11
    assert model.config.neck_channels == [8, 16, 32, 64]
    report = load_head(model, str(head))
    assert report.new == ()
    assert report.unused == ()
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(head).state_dict()
    for name in report.loaded:
        assert torch.equal(model.state_dict()[name], theirs[name]), name


def test_another_number_of_classes_keeps_all_but_the_class_head(head: Path) -> None:
    categories = [*CATEGORIES, {"id": 20, "name": "cow"}]
    model = build_model(VIT, categories, image_size=(64, 64), head_checkpoint=str(head))
    report = load_head(model, str(head))
    assert report.new == ("class_predictor.weight", "class_predictor.bias")
    assert "2 new (class_predictor.weight, class_predictor.bias)" in str(report)


def test_a_head_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="head_checkpoint"):
        tiny_model(head_checkpoint=str(tmp_path))


def test_a_new_run_from_a_model_of_ours_carries_class_scores_over_by_name(tmp_path: Path) -> None:
    old = tiny_model()
    old.save_pretrained(tmp_path)
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}, {"id": 3, "name": "cat"}]
    new = tiny_model(init_from=str(tmp_path), categories=categories)
    assert torch.equal(new.class_predictor.weight[[2, 0, 3]], old.class_predictor.weight)
    shared = [name for name in old.state_dict() if not name.startswith("class_predictor")]
    assert all(torch.equal(new.state_dict()[name], old.state_dict()[name]) for name in shared)


def test_a_new_run_leaves_out_the_layers_that_its_start_left_out(tmp_path: Path) -> None:
    whole = {**VIT, "num_hidden_layers": 3}
    old = tiny_model(whole, taps=(2,))
    old.save_pretrained(tmp_path)
    new = tiny_model(whole, init_from=str(tmp_path))
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in new.state_dict().items())


@pytest.mark.parametrize("backbone", [DINOV2, {**VIT, "hidden_size": 16}])
def test_a_new_run_on_another_backbone_than_its_start_is_refused(backbone: Any, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"init_from .*: its backbone \(dinov3_vit\) differs from this model's: \d+ tensors"
    ):
        tiny_model(backbone, image_size=(56, 56), init_from=str(tmp_path))


def test_more_queries_than_the_source_has_keep_its_own_and_say_how_many_are_new(head: Path, tmp_path: Path) -> None:
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(head).state_dict()
    more = build_model(VIT, CATEGORIES, image_size=(64, 64), head_checkpoint=str(head), num_queries=15)
    report = load_head(more, str(head))
    assert "11 of the source's 11 queries copied, 4 new" in str(report)
    assert report.new == ()
    for name in ("queries_embedder.weight", "queries_features.weight"):
        name = f"model.transformer_module.{name}"
        assert torch.equal(more.state_dict()[name][:11], theirs[name])
        assert more.state_dict()[name][11:].std() == pytest.approx(1, abs=0.3)
    more.save_pretrained(tmp_path)
    fewer = tiny_model(init_from=str(tmp_path), num_queries=5)
    name = "model.transformer_module.queries_embedder.weight"
    assert torch.equal(fewer.state_dict()[name], more.state_dict()[name][:5])
