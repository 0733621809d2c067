"""Starting from a published head, from one of ours, or from a model of ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinConfig,
)

from m2f_trainer.model.backbones import ModelError
from m2f_trainer.model.build import build_model
from m2f_trainer.model.transformer_decoder import decoder_layer
from m2f_trainer.model.weights import ENCODER, PIXEL_DECODER, _oneformer_name, load_head, read_head
from tests.model.published import randomize
from tests.model.tiny import CATEGORIES, DINOV2, HEAD, VIT, tiny_model


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers Mask2Former on a tiny Swin, as the published ones are."""
    folder = tmp_path_factory.mktemp("head")
    names = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64, out_features=names)
    torch.manual_seed(5)
    fields = {**HEAD, "num_queries": 11}
    names = {0: "cat", 1: "dog"}
    Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin, id2label=names, **fields)
    ).save_pretrained(folder)
    return folder


def test_the_pyramid_takes_the_heads_channels_so_that_every_head_tensor_loads(head: Path) -> None:
    model = build_model(VIT, CATEGORIES, image_size=(64, 64), head_checkpoint=str(head))
    assert model.config.num_queries == 11
    assert model.config.neck_channels == [8, 16, 32, 64]
    report = load_head(model, read_head(str(head)))
    assert report.new == ()
    assert report.unused == ()
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(head).state_dict()
    assert report.classes == "classes kept: cat, dog"
    for name in (*report.loaded, "class_predictor.weight", "class_predictor.bias"):
        assert torch.equal(model.state_dict()[name], theirs[name]), name


def test_a_published_heads_class_scores_are_carried_over_by_name(head: Path) -> None:
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    model = build_model(VIT, categories, image_size=(64, 64), head_checkpoint=str(head))
    report = load_head(model, read_head(str(head)))
    assert str(report).endswith("0 new; 0 unused; classes kept: dog; new: cow; dropped: cat")
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(head).class_predictor.weight
    assert torch.equal(model.class_predictor.weight[[0, 2]], theirs[[1, 2]])  # the last row is "no object"
    assert not any(torch.equal(model.class_predictor.weight[1], row) for row in theirs)


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


def test_a_class_of_another_name_starts_new_also_where_the_number_of_classes_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tiny_model()
    old.class_predictor.weight.data += 1  # as trained
    old.save_pretrained(tmp_path)
    new = tiny_model(init_from=str(tmp_path), categories=[{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}])
    assert torch.equal(new.class_predictor.weight[[0, 2]], old.class_predictor.weight[[1, 2]])
    assert not any(torch.equal(new.class_predictor.weight[1], row) for row in old.class_predictor.weight)
    assert "classes kept: dog; new: cow; dropped: cat" in caplog.text


def test_class_scores_are_carried_over_without_regard_to_case_and_spaces_unless_that_is_ambiguous(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["Traffic  light", "cat", "Dog", "dog "]
    old = tiny_model(categories=[{"id": k, "name": name} for k, name in enumerate(names)])
    old.save_pretrained(tmp_path)
    own = ["DOG", "Cat", "traffic light", "Dog"]
    new = tiny_model(init_from=str(tmp_path), categories=[{"id": k, "name": name} for k, name in enumerate(own)])
    assert torch.equal(new.class_predictor.weight[[1, 2, 3, 4]], old.class_predictor.weight[[1, 0, 2, 4]])
    assert "classes kept: Cat, traffic light, Dog; new: DOG; dropped: dog " in caplog.text


def test_the_weights_of_the_classes_in_the_loss_are_those_of_the_new_run(tmp_path: Path) -> None:
    tiny_model(class_weights=[2.0, 3.0]).save_pretrained(tmp_path)
    new = tiny_model(init_from=str(tmp_path), class_weights=[5.0, 7.0])
    expected = tiny_model(class_weights=[5.0, 7.0]).criterion.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in new.criterion.state_dict().items())


def test_a_changed_neck_keeps_the_layers_that_both_have(tmp_path: Path) -> None:
    old = tiny_model(neck="pyramid")
    old.save_pretrained(tmp_path)
    new = tiny_model(neck="adapter", init_from=str(tmp_path))
    theirs, ours = old.encoder.neck.state_dict(), new.encoder.neck.state_dict()
    assert ours.keys() > theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    plain = tiny_model(neck="plain", init_from=str(tmp_path))
    name = "model.transformer_module.decoder.layers.0.fc1.weight"
    assert torch.equal(plain.state_dict()[name], old.state_dict()[name])


@pytest.mark.parametrize("backbone", [{**VIT, "num_hidden_layers": 3}, {**DINOV2, "patch_size": 8, "image_size": 64}])
def test_a_head_of_ours_starts_on_another_backbone_of_the_same_width(backbone: Any, tmp_path: Path) -> None:
    old = tiny_model(quality_weight=1.0)
    old.save_pretrained(tmp_path)
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    new = build_model(
        backbone, categories, image_size=(64, 64), taps=(1, 2), head_checkpoint=str(tmp_path), quality_weight=1.0,
        neck="pyramid",
    )  # fmt: skip
    report = load_head(new, read_head(str(tmp_path)))
    assert (report.new, report.unused) == ((), ())
    theirs, ours = old.state_dict(), new.state_dict()
    assert report.loaded
    assert all(torch.equal(ours[name], theirs[name]) for name in report.loaded)
    assert any(".neck." in name for name in report.loaded)
    assert torch.equal(new.class_predictor.weight[[0, 2]], old.class_predictor.weight[[1, 2]])
    assert new.config.decoder_layers == HEAD["decoder_layers"]


def oneformer(folder: Path, **fields: Any) -> OneFormerForUniversalSegmentation:
    """A OneFormer of transformers on a tiny Swin, as the published ones are."""
    names = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64, out_features=names)
    torch.manual_seed(5)
    config = OneFormerConfig(
        backbone_config=swin, num_labels=5, hidden_dim=32, conv_dim=32, mask_dim=32, encoder_layers=2,
        encoder_feedforward_dim=32, decoder_layers=4, dim_feedforward=32, num_attention_heads=2, num_queries=9,
        text_encoder_width=16, text_encoder_num_layers=1, text_encoder_vocab_size=20, **fields,
    )  # fmt: skip
    model = randomize(OneFormerForUniversalSegmentation(config))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_a_oneformer_gives_its_pixel_decoder_and_its_decoder_layers(tmp_path: Path) -> None:
    """Proved by equal outputs; queries and class head are new, text and task parts are left out."""
    theirs = oneformer(tmp_path)
    model = build_model(VIT, CATEGORIES, image_size=(64, 64), head_checkpoint=str(tmp_path), num_queries=7).eval()
    report = load_head(model, read_head(str(tmp_path)))
    queries = [f"model.transformer_module.queries_{part}.weight" for part in ("embedder", "features")]
    assert sorted(report.new) == queries
    assert report.unused
    assert all(name.startswith("oneformer.") for name in report.unused)
    assert report.classes == "classes new: cat, dog"
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(1, c, s, s, generator=generator) for c, s in zip((8, 16, 32, 64), (16, 8, 4, 2), strict=True)]
    expected = theirs.model.pixel_level_module.decoder(maps)
    features, levels = model.model.pixel_level_module.decoder(maps)
    torch.testing.assert_close(features, expected.mask_features, atol=1e-5, rtol=1e-5)
    for found, other in zip(levels, expected.multi_scale_features, strict=True):
        torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-5)
    hidden, positions = (torch.randn(1, 7, 32, generator=generator) for _ in range(2))
    memory, places = (torch.randn(1, 16, 32, generator=generator) for _ in range(2))
    outside = torch.rand(1, 7, 16, generator=generator) < 0.5
    heads = theirs.config.num_attention_heads
    for own, other in zip(
        model.model.transformer_module.decoder.layers, theirs.model.transformer_module.decoder.layers, strict=True
    ):
        found = decoder_layer(own, hidden, positions, memory, places, ~outside.unsqueeze(1))
        (same,) = other(
            0, hidden.transpose(0, 1), [memory.transpose(0, 1)] * 3, [places.transpose(0, 1)] * 3,
            attention_mask=outside.repeat(heads, 1, 1), query_embeddings=positions.transpose(0, 1),
        )  # fmt: skip
        torch.testing.assert_close(found, same.transpose(0, 1), atol=1e-5, rtol=1e-5)
    embed = model.model.transformer_module.decoder.mask_predictor.mask_embedder(hidden)
    torch.testing.assert_close(embed, theirs.model.transformer_module.decoder.mask_embed(hidden), atol=1e-6, rtol=1e-5)
    norm = theirs.model.transformer_module.decoder.decoder_norm
    assert torch.equal(model.model.transformer_module.decoder.layernorm(hidden), norm(hidden))


def test_the_published_counts_of_loaded_tensors_hold() -> None:
    """Of models of the published size, whose names and shapes alone are compared."""
    names = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=names)
    with torch.device("meta"):
        theirs = OneFormerForUniversalSegmentation(OneFormerConfig(backbone_config=swin)).state_dict()
        ours = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin)).state_dict()
    head = {name: one.shape for name, one in ours.items() if not name.startswith(ENCODER) and "criterion" not in name}
    given = {_oneformer_name(name): one.shape for name, one in theirs.items()}
    loaded = [name for name in head if given.get(name) == head[name]]
    pixel = [[name for name in names if name.startswith(PIXEL_DECODER)] for names in (loaded, head)]
    assert (len(loaded), len(head)) == (324, 328)
    assert [len(names) for names in pixel] == [117, 117]


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
    report = load_head(more, read_head(str(head)))
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
