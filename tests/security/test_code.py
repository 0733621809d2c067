"""No code of an untrusted model folder or recipe runs."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2f_trainer.model.attention import NAME as ATTENTION
from m2f_trainer.model.backbones import read_config
from m2f_trainer.model.mask2former import load_model
from tests.model.tiny import DINOV2
from tests.security.conftest import Command, change


@pytest.fixture
def evil(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model folder of an unknown type whose code creates a file, and that file; every question is answered "y"."""
    mark = tmp_path / "mark"
    (model / "evil.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedConfig\n"
        f"Path({str(mark)!r}).touch()\n\n\nclass Evil(PreTrainedConfig):\n    model_type = 'evil'\n"
    )
    change(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return model, mark


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_code_of_a_model_folder_never_runs(
    command: str, evil: tuple[Path, Path], m2f: Command, photo: Path, dataset: Path, tmp_path: Path
) -> None:
    model, mark = evil
    rest = {"predict": [photo], "evaluate": [dataset], "export": []}[command]
    ran = m2f(command, model, *rest, "--output_dir", tmp_path / "output")
    assert ran.status == 1
    assert not mark.exists()
    assert "its own code, which is never run" in ran.err
    assert "trust_remote_code" not in ran.err
    assert "[y/N]" not in ran.out


@pytest.mark.parametrize("field", ["backbone", "init_from", "head_checkpoint"])
def test_code_of_a_folder_that_training_starts_from_never_runs(
    field: str, evil: tuple[Path, Path], m2f: Command, recipe: Callable[..., Path]
) -> None:
    model, mark = evil
    config = {"backbone_config": None} if field == "backbone" else {}
    ran = m2f("train", recipe(**{field: str(model)}, **config))
    assert ran.status == 1
    assert not mark.exists()
    assert "[y/N]" not in ran.out


def test_an_attention_kernel_named_in_a_model_folder_is_not_loaded(model: Path) -> None:
    """transformers would download and run the code of a repository that is named there."""
    change(model / "config.json", attn_implementation="someone/kernel")
    loaded = load_model(str(model))
    assert loaded.config._attn_implementation in ("eager", "sdpa")
    assert loaded.encoder.backbone.config._attn_implementation == ATTENTION


def test_an_attention_kernel_of_a_nested_backbone_is_not_loaded(model: Path) -> None:
    nested = load_model(str(model)).config.to_dict()["backbone_config"]
    change(model / "config.json", backbone_config={**nested, "attn_implementation": "someone/kernel"})
    assert load_model(str(model)).encoder.backbone.config._attn_implementation == ATTENTION


def test_an_attention_kernel_named_in_a_recipe_is_not_loaded() -> None:
    assert read_config({**DINOV2, "attn_implementation": "someone/kernel"})._attn_implementation is None
