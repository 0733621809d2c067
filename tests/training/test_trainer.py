"""The Trainer's seams, used from a notebook."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch.utils.data import TensorDataset

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError, SharingError
from m2f_trainer.hub.upload import push
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.training.trainer import M2FTrainer
from tests.hub.loopback import Hub
from tests.model.tiny import tiny_model


def trainer_of(folder: Path, **fields: Any) -> M2FTrainer:
    """A trainer as a notebook makes it."""
    rest = {"use_cpu": True, "report_to": "none", "dataloader_num_workers": 0}
    arguments = TrainArguments(output_dir=str(folder), **rest, **fields)
    return M2FTrainer(tiny_model(), arguments, eval_dataset=TensorDataset(torch.zeros(1)))


def test_a_model_saved_by_hand_has_no_pickle_beside_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        trainer.save_model(None if folder == tmp_path else str(folder))
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        load_model(str(folder))


def test_the_trainers_own_upload_of_the_whole_folder_is_refused_with_the_way_that_sends_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_canaryCanaryCanaryCanaryCanary")
    (tmp_path / "logs.txt").write_text("stays here")
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        for strategy in ("end", "every_save"):
            with pytest.raises(RecipeError, match=r"would upload all of .* run m2f push .* NAME/MODEL"):
                trainer_of(tmp_path, push_to_hub=True, hub_model_id="me/pets", hub_strategy=strategy)
        trainer = trainer_of(tmp_path)
        with pytest.raises(SharingError, match=r"would upload all of .* run m2f push .* NAME/MODEL"):
            trainer.push_to_hub()
        trainer.save_model()
        assert not hub.requests
        push(str(tmp_path), "me/pets")
    code = {name for name in hub.files if name.endswith(".py")}
    legal = {"LICENSE", "NOTICE", "DINOV3_LICENSE.md"}
    assert set(hub.files) - code == {"README.md", "config.json", "model.safetensors"} | legal
    assert not any(b"stays here" in body for body in hub.bodies)
