"""Building a model to train: what it starts from, and what is refused."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel

from m2f_trainer.data.dataset import Category
from m2f_trainer.model.backbones import ModelError, read_config
from m2f_trainer.model.build import build_model, load_base_weights, resume_model
from m2f_trainer.model.lora import save_adapter, set_tuning
from m2f_trainer.model.mask2former import load_model
from tests.model.published import MetaViT
from tests.model.tiny import CATEGORIES, DINOV2, HEAD, VIT, images, labels, tiny_model

SATELLITE = ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))


def test_a_model_normalises_images_as_its_backbone_was_trained(tmp_path: Path) -> None:
    """Also after saving, and in a run that starts from it."""
    weights = tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    torch.save(MetaViT().state_dict(), weights)
    tiny_model(str(weights)).save_pretrained(tmp_path / "run")
    again = load_model(str(tmp_path / "run"))
    assert (tuple(again.config.image_mean), tuple(again.config.image_std)) == SATELLITE
    assert again.config.backbone_licence == "dinov3-license"
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in SATELLITE)
    pixels = images(1)
    torch.testing.assert_close(again.normalise(pixels, None), (pixels / 255 - mean) / std)
    started = tiny_model(again.config.backbone_config.to_dict(), init_from=str(tmp_path / "run"))
    assert (tuple(started.config.image_mean), tuple(started.config.image_std)) == SATELLITE


@pytest.mark.parametrize(("fields", "words"), [
    ({"image_size": (64, 60)}, ["image_width 60", "multiple of 8", "56 and 64"]),
    ({"neck": "fpn"}, ["neck must be", "'fpn'"]),
    ({"taps": (1, 5)}, ["[5]", "2 layers"]),
    ({"dropout": 0.1}, ["dropout"]),
    ({"decoder_layer": 3}, ["'decoder_layer'", "'decoder_layers'"]),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_way_out(fields, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError) as caught:
        tiny_model(**fields)
    assert all(word in str(caught.value) for word in words)


def test_a_gated_or_unknown_backbone_names_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="accept the licence") as caught:
        tiny_model("dinov3-vits16plus")
    for way_out in (
        "--backbone timm/vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
        "dinov3_vits16plus_pretrain_lvd1689m-*.pth",
        "dinov2-small, lingbot-vits16",
    ):
        assert way_out in str(caught.value)


def test_an_unknown_name_without_access_to_the_hub_says_how_to_use_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "timm/vit_small_patch16_dinov4.lvd1689m"
    with pytest.raises(ModelError, match=f"the backbone '{name}' could not be loaded") as caught:
        tiny_model(name)
    download = f"download config.json and model.safetensors from https://huggingface.co/{name} on another one"
    for way_out in (download, "--backbone FOLDER", "--backbone FILE.pth or FILE.safetensors", "known names"):
        assert way_out in str(caught.value)


def test_a_new_run_reads_the_backbone_layers_that_the_neck_it_starts_from_reads(tmp_path: Path) -> None:
    old = tiny_model(taps=(2,))
    old.save_pretrained(tmp_path)
    new = tiny_model(init_from=str(tmp_path))
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in new.state_dict().items())
    assert len(tiny_model(init_from=str(tmp_path), taps=(1, 2)).config.backbone_config.out_features) == 2


def test_without_other_settings_a_new_run_has_the_head_of_the_model_that_it_starts_from(tmp_path: Path) -> None:
    """The weights of a light head would otherwise fit no layer of the original one, which is the default."""
    old = tiny_model(neck="adapter", neck_channels=[8, 16, 16, 32])
    old.save_pretrained(tmp_path)
    for start in ({"init_from": str(tmp_path)}, {"head_checkpoint": str(tmp_path)}):
        new = build_model(VIT, CATEGORIES, image_size=(64, 64), **start)
        own = {name: tensor for name, tensor in new.state_dict().items() if ".backbone." not in name}
        assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in own.items())
        assert new.config.train_num_points == HEAD["train_num_points"]


def test_a_new_run_from_a_model_needs_no_access_to_its_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    torch.save(MetaViT().state_dict(), weights)
    old = tiny_model(str(weights))
    old.save_pretrained(tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("dinov3-vits16", "timm/vit_small_patch16_dinov3.lvd1689m"):
        new = tiny_model(name, init_from=str(tmp_path / "run"))
        assert all(torch.equal(tensor, old.state_dict()[key]) for key, tensor in new.state_dict().items())
        assert new.config.backbone_name == name


def test_a_new_run_from_a_model_needs_no_folder_of_its_backbone(tmp_path: Path) -> None:
    published = AutoModel.from_config(AutoConfig.for_model(**DINOV2))
    published.save_pretrained(tmp_path / "backbone")
    old = tiny_model(str(tmp_path / "backbone"), image_size=(56, 56))
    old.save_pretrained(tmp_path / "run")
    (tmp_path / "backbone").rename(tmp_path / "moved")
    new = tiny_model(str(tmp_path / "backbone"), image_size=(56, 56), init_from=str(tmp_path / "run"))
    assert all(torch.equal(tensor, old.state_dict()[key]) for key, tensor in new.state_dict().items())
    assert new.config.backbone_name == old.config.backbone_name


def test_the_model_of_a_resumed_run_is_that_of_its_checkpoint_with_the_same_parameters_trained(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "first")
    old = tiny_model(init_from=str(tmp_path / "first"))
    old.save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    new = resume_model(str(tmp_path / "second"), image_height=32, class_weights=[1, 2])
    assert all(torch.equal(tensor, old.state_dict()[key]) for key, tensor in new.state_dict().items())
    trained, trained_before = ([(key, one.requires_grad) for key, one in of.named_parameters()] for of in (new, old))
    assert trained == trained_before
    assert (new.config.image_height, new.config.class_weights) == (32, [1.0, 2.0])
    assert new.config.init_from == str(tmp_path / "first")
    with pytest.raises(ModelError, match="image_height 60: this backbone needs a multiple of 8"):
        resume_model(str(tmp_path / "second"), image_height=60)


@pytest.mark.parametrize("source", ["init_from", "backbone"])
def test_a_model_with_lora_gets_the_backbone_that_it_began_with(source: str, tmp_path: Path) -> None:
    published = AutoModel.from_config(AutoConfig.for_model(**DINOV2))
    published.save_pretrained(tmp_path / "backbone")
    first = tiny_model(str(tmp_path / "backbone"), image_size=(56, 56))
    if source == "init_from":
        torch.nn.init.ones_(next(first.encoder.backbone.parameters()))
    first.save_pretrained(tmp_path / "first")
    init_from = str(tmp_path / "first") if source == "init_from" else None
    resumed = resume_model(str(tmp_path / "first"), has_weights=False)
    load_base_weights(resumed, init_from)
    base = resumed.encoder.backbone.state_dict()
    wanted = first.encoder.backbone.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in base.items() if "mask_token" not in key)


def test_a_folder_that_weights_started_from_is_remembered_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model card would name `runs/first` as a Hub id, and its licences would be lost from elsewhere."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("runs/first")
    assert tiny_model(init_from="runs/first").config.init_from == str(tmp_path / "runs" / "first")


def test_a_pretrained_backbone_starts_with_its_published_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    published = AutoModel.from_config(AutoConfig.for_model(**DINOV2))
    published.save_pretrained(tmp_path)
    started = tiny_model(str(tmp_path), image_size=(56, 56)).encoder.backbone.state_dict()
    assert started.keys() == published.state_dict().keys()
    assert all(torch.equal(started[name], tensor) for name, tensor in published.state_dict().items())


def test_a_new_run_has_the_neck_of_its_start_unless_another_is_named(tmp_path: Path) -> None:
    tiny_model(neck="pyramid").save_pretrained(tmp_path)
    for given, expected in (({}, "pyramid"), ({"neck": "adapter"}, "adapter")):
        new = build_model(VIT, CATEGORIES, image_size=(64, 64), init_from=str(tmp_path), **given)
        assert new.config.neck == expected


def test_categories_are_those_of_a_dataset_or_dictionaries_with_distinct_ids() -> None:
    expected = tiny_model(categories=CATEGORIES).config.categories
    assert tiny_model(categories=[Category(**one) for one in CATEGORIES]).config.categories == expected
    for wrong, message in (
        ([], r"got the ids \[\]"),
        ([CATEGORIES[0], CATEGORIES[0]], r"distinct ids, got the ids \[3, 3\]"),
        (["cat"], "expected each as {'id': 1, 'name': 'cat'}"),
        ([{"id": "x", "name": "cat"}], "expected each as {'id': 1, 'name': 'cat'}"),
    ):
        with pytest.raises(ModelError, match=message):
            tiny_model(categories=wrong)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_saved_weights_may_be_read_by_whoever_may_read_the_configuration(tmp_path: Path) -> None:
    AutoBackbone.from_config(read_config(VIT)).save_pretrained(tmp_path / "backbone")
    model = tiny_model(str(tmp_path / "backbone"))
    set_tuning(model, "lora")
    model.save_pretrained(tmp_path / "model")
    save_adapter(model, tmp_path / "adapter")
    for folder in (tmp_path / "model", tmp_path / "adapter"):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert len(modes) >= 2
        assert set(modes.values()) == {modes["config.json"]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("discrimination_weight", 5), ("quality_weight", 2), ("mask_weight", 10), ("tile_overlap", 0),
        ("class_weights", [1, 2]), ("pixel_range", (0, 4095)), ("rope_rescale", 2), ("drop_path", 0),
    ],
)  # fmt: skip
def test_whole_numbers_are_taken_for_floats(field: str, value: Any, tmp_path: Path) -> None:
    model = tiny_model(**{field: value}).train()
    assert torch.isfinite(model(images(), **labels()).loss)
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path))


def test_a_field_of_another_type_is_refused_with_its_name_also_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"head's configuration: .*'tile_overlap' expected float, got str"):
        tiny_model(tile_overlap="much")
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tile_overlap": "much"}))
    with pytest.raises(ModelError, match=r"config.json of .*'tile_overlap' expected float, got str.*Correct it"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("no_object_weight", -0.1, "at least 0"), ("oversample_ratio", 0.5, "importance_sample_ratio or more"),
        ("importance_sample_ratio", 1.5, "between 0 and 1"), ("train_num_points", 0, "at least 1"),
    ],
)  # fmt: skip
def test_a_setting_that_the_loss_cannot_be_computed_with_is_refused(field: str, value: float, expected: str) -> None:
    with pytest.raises(ModelError, match=f"{field} of the head's configuration: expected {expected}, got {value}"):
        tiny_model(**{field: value})


@pytest.mark.parametrize("neck", ["pyramid", "adapter", "top_down", "plain"])
def test_every_accepted_image_of_a_vit_can_be_trained_on(neck: str) -> None:
    """All necks but the plain one halve the map of a ViT, so that it needs two patches a side."""
    for size in ((14, 14), (14, 28), (28, 14), (28, 28)):
        if neck != "plain" and 14 in size:
            with pytest.raises(ModelError, match=r"image_(height|width) 14: .*at least 28; nearest are 28 and 42"):
                tiny_model(DINOV2, image_size=size, neck=neck)
        else:
            model = tiny_model(DINOV2, image_size=size, neck=neck).train()
            assert torch.isfinite(model(images(2, *size), **labels(*size)).loss)


def test_a_head_that_changed_after_a_failed_start_is_read_again(tmp_path: Path) -> None:
    source = tiny_model()
    source.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="image_height 65"):
        tiny_model(image_size=(65, 64), head_checkpoint=str(tmp_path))
    with torch.no_grad():
        source.class_predictor.weight.add_(1)
    source.save_pretrained(tmp_path)
    found = tiny_model(head_checkpoint=str(tmp_path)).class_predictor.weight
    assert torch.equal(found, source.class_predictor.weight)
