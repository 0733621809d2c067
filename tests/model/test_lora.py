"""Which backbone weights are trained, and how a model with adapters is saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone

from m2f_trainer.model.backbones import ModelError, read_config
from m2f_trainer.model.lora import (
    LoraSettings,
    load_adapter,
    load_adapters,
    lora_layers,
    merge,
    save_adapter,
    set_tuning,
)
from m2f_trainer.model.mask2former import M2FModel, load_model
from tests.model.test_families import family
from tests.model.tiny import CONVNEXT, VIT, images, labels, tiny_model

BACKBONE = "pixel_level_module.encoder.backbone"


def adapted(mlp: bool = False) -> M2FModel:
    """A model whose adapters have left their start at zero."""
    return perturbed(tiny_model(), mlp)


def masks(model: M2FModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images()).masks_queries_logits


def test_frozen_trains_everything_but_the_backbone_and_builds_no_graph_in_it() -> None:
    model = tiny_model()
    set_tuning(model, "frozen")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(BACKBONE in name for name in trained)
    model.train()
    encoder = model.model.pixel_level_module.encoder
    assert not encoder.backbone.training
    assert encoder.neck.training
    model(images(), **labels()).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in trained)


def test_lora_trains_attention_factors_neck_and_head() -> None:
    model = adapted()
    assert all(".attention." in name for name in lora_layers(model))
    assert any(".mlp." in name for name in lora_layers(adapted(mlp=True)))
    in_backbone = {name for name, parameter in model.named_parameters() if parameter.requires_grad and BACKBONE in name}
    assert in_backbone
    assert all(".lora_" in name for name in in_backbone)
    model.train()
    model(images(), **labels()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_model_with_adapters_saves_merged_and_loads_without_peft(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert not lora_layers(loaded)
    torch.testing.assert_close(masks(loaded), masks(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masks(loaded), masks(tiny_model()), atol=1e-3), "the adapters do something"


def test_factors_come_back_exactly_from_a_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    again = tiny_model()
    set_tuning(again, "lora", LoraSettings(rank=4, alpha=8))
    result = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert torch.equal(masks(again), masks(model))


def test_factors_on_another_backbone_are_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    torch.manual_seed(99)
    other = M2FModel(tiny_model().config)
    set_tuning(other, "lora", LoraSettings(rank=4, alpha=8))
    with pytest.raises(ModelError, match="other pretrained weights"):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_merging_gives_the_same_outputs_and_a_plain_model() -> None:
    model = adapted()
    before = masks(model)
    merge(model)
    assert not lora_layers(model)
    torch.testing.assert_close(masks(model), before, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_an_adapter_alone_is_put_on_its_backbone_again(tmp_path: Path) -> None:
    torch.manual_seed(7)
    AutoBackbone.from_config(read_config(VIT)).save_pretrained(tmp_path / "backbone")
    model = tiny_model(str(tmp_path / "backbone"))
    set_tuning(model, "lora", LoraSettings(rank=4, alpha=8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_adapter(model, tmp_path / "adapter")
    saved = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert saved < 4 * sum(parameter.numel() for parameter in model.parameters())
    torch.testing.assert_close(masks(load_adapter(tmp_path / "adapter")), masks(model), rtol=1e-4, atol=1e-5)


def trained_adapter(folder: Path, backbone: str, seed: int, classes: int) -> M2FModel:
    """A model on a saved backbone whose factors, neck and head are its own, saved adapter-only."""
    model = tiny_model(backbone, categories=[{"id": k, "name": str(k)} for k in range(classes)])
    set_tuning(model, "lora", LoraSettings(rank=4, alpha=8))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, folder)
    return model


def test_several_adapters_share_one_backbone_and_each_gives_its_own_outputs(tmp_path: Path) -> None:
    for name in ("base", "other"):
        AutoBackbone.from_config(read_config(VIT)).save_pretrained(tmp_path / name)
    trained = {k: trained_adapter(tmp_path / f"a{k}", str(tmp_path / "base"), k, classes=k + 1) for k in (1, 2)}
    loaded = load_adapters({f"a{k}": tmp_path / f"a{k}" for k in trained})
    for k, model in trained.items():
        torch.testing.assert_close(masks(loaded[f"a{k}"]), masks(model), rtol=1e-4, atol=1e-5)
        assert loaded[f"a{k}"].class_predictor.out_features == k + 2
    first, second = (dict(model.encoder.backbone.named_parameters()) for model in loaded.values())
    shared = {name for name in first if first[name].data_ptr() == second[name].data_ptr()}
    assert shared == {name for name in first if ".lora_" not in name}
    trained_adapter(tmp_path / "b", str(tmp_path / "other"), 3, classes=1)
    with pytest.raises(ModelError, match="only adapters of one backbone"):
        load_adapters({"a": tmp_path / "a1", "b": tmp_path / "b"})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a backbone of 6 layers, which has more layers to adapt than peft lists."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("published")
    AutoBackbone.from_config(read_config({**VIT, "num_hidden_layers": 6})).save_pretrained(folder)
    return str(folder)


def perturbed(model: M2FModel, mlp: bool = False) -> M2FModel:
    """The model with trained factors."""
    set_tuning(model, "lora", LoraSettings(rank=4, alpha=8, mlp=mlp))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model.eval()


def test_the_factors_of_all_adapted_layers_of_a_deep_backbone_come_back(published: str, tmp_path: Path) -> None:
    model = perturbed(tiny_model(published), mlp=True)
    assert len(lora_layers(model)) == 36
    save_adapter(model, tmp_path)
    torch.testing.assert_close(masks(load_adapter(tmp_path)), masks(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["lacks", "adds"])
def test_an_adapter_that_does_not_fit_its_configuration_is_refused(published: str, tmp_path: Path, change: str) -> None:
    save_adapter(perturbed(tiny_model(published)), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if change == "lacks":
        tensors.pop("class_predictor.bias")
    else:
        tensors["class_predictor.scale"] = torch.zeros(3)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"doesn't fit the configuration beside it: 1 tensors .*class_predictor"):
        load_adapter(tmp_path)


def test_an_adapter_is_only_saved_where_its_backbone_can_be_loaded_again(
    published: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelError, match="needs a published backbone, and this one started with random weights"):
        save_adapter(adapted(), tmp_path / "random")
    frozen = tiny_model(published)
    set_tuning(frozen, "frozen")
    frozen.save_pretrained(tmp_path / "frozen")
    same = perturbed(tiny_model(published, init_from=str(tmp_path / "frozen")))
    save_adapter(same, tmp_path / "same")
    torch.testing.assert_close(masks(load_adapter(tmp_path / "same")), masks(same), rtol=1e-4, atol=1e-5)
    perturbed(tiny_model(published)).save_pretrained(tmp_path / "trained")
    with pytest.raises(ModelError, match=r"differs from that of .*: it was trained there"):
        save_adapter(perturbed(tiny_model(published, init_from=str(tmp_path / "trained"))), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    away = perturbed(tiny_model(published, init_from=str(tmp_path / "frozen")))
    away.config.backbone_name = str(tmp_path / "gone")
    save_adapter(away, tmp_path / "away")
    assert (tmp_path / "away/adapter_model.safetensors").is_file(), "it is not known that it differs"
    assert "the adapter's base is not compared with" in caplog.text


def test_adapters_that_read_other_layers_share_the_deepest_backbone(published: str, tmp_path: Path) -> None:
    trained = {name: perturbed(tiny_model(published, taps=taps)) for name, taps in (("a", (2, 3)), ("b", (3, 6)))}
    for name, model in trained.items():
        save_adapter(model, tmp_path / name)
    loaded = load_adapters({name: tmp_path / name for name in trained})
    assert list(loaded) == ["a", "b"]
    for name, model in trained.items():
        torch.testing.assert_close(masks(loaded[name]), masks(model), rtol=1e-4, atol=1e-5)


def test_merging_one_of_several_adapters_leaves_the_others_as_they_are(published: str, tmp_path: Path) -> None:
    save_adapter(perturbed(tiny_model(published)), tmp_path)
    loaded = load_adapters({"a": tmp_path, "b": tmp_path})
    before = masks(loaded["b"])
    merge(loaded["a"])
    assert torch.equal(masks(loaded["b"]), before)
    torch.testing.assert_close(masks(loaded["a"]), before, rtol=1e-4, atol=1e-5)


def test_lora_adapts_hieras_attention_too() -> None:
    model = tiny_model(family("hiera"))
    set_tuning(model, "lora", LoraSettings(rank=2, mlp=True))
    assert {name.split(".")[-2] for name in lora_layers(model)} == {"attn", "mlp"}


def test_lora_on_a_backbone_without_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="attention layers"):
        set_tuning(tiny_model(CONVNEXT), "lora")


def test_an_unknown_way_of_tuning_is_refused() -> None:
    with pytest.raises(ModelError, match="'frozen', 'lora' or 'full'"):
        set_tuning(tiny_model(), "half")
