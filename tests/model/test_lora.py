"""Which backbone weights are trained, and how a model with adapters is saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2f_trainer.model.backbones import ModelError
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
from tests.model.tiny import CONVNEXT, VIT, images, labels, tiny_model

BACKBONE = "pixel_level_module.encoder.backbone"


def adapted(mlp: bool = False) -> M2FModel:
    """A model whose adapters have left their start at zero."""
    model = tiny_model()
    set_tuning(model, "lora", LoraSettings(rank=4, alpha=8, mlp=mlp))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model.eval()


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
    from transformers import AutoBackbone

    from m2f_trainer.model.backbones import read_config

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
    from transformers import AutoBackbone

    from m2f_trainer.model.backbones import read_config

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


def test_lora_on_a_backbone_without_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="attention layers"):
        set_tuning(tiny_model(CONVNEXT), "lora")


def test_an_unknown_way_of_tuning_is_refused() -> None:
    with pytest.raises(ModelError, match="'frozen', 'lora' or 'full'"):
        set_tuning(tiny_model(), "half")
