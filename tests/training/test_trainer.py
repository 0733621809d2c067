"""The Trainer's seams, used from a notebook."""

from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from m2f_trainer.model.mask2former import load_model
from m2f_trainer.train_arguments import TrainArguments
from m2f_trainer.training.trainer import M2FTrainer
from tests.model.tiny import tiny_model


def test_a_model_saved_by_hand_has_no_pickle_beside_it(tmp_path: Path) -> None:
    arguments = TrainArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", dataloader_num_workers=0)
    trainer = M2FTrainer(tiny_model(), arguments, eval_dataset=TensorDataset(torch.zeros(1)))
    for folder in (tmp_path, tmp_path / "elsewhere"):
        trainer.save_model(None if folder == tmp_path else str(folder))
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        load_model(str(folder))
