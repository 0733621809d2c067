"""Pictures of samples and predictions reach TensorBoard, and nothing is asked of it where it isn't used."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from m2f_trainer.data.coco import categories_of, load_coco
from m2f_trainer.data.collator import InstanceDataset
from m2f_trainer.data.sample import write_sample
from m2f_trainer.data.transforms import TrainTransform
from m2f_trainer.training.pictures import Pictures
from tests.evaluation.truth import perfect


class Writer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.images: dict[str, np.ndarray] = {}

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        assert (step, dataformats) == (7, "HWC")
        self.images[name] = picture


def trainer(folder: Path, *callbacks: Any) -> Any:
    splits = load_coco(write_sample(folder / "data", images=(5, 2, 0)))
    samples, valid = (
        InstanceDataset(splits[name], TrainTransform(64, 64), categories_of(splits["train"]))
        for name in ("train", "valid")
    )
    return SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=list(callbacks)),
        train_dataset=samples, eval_dataset=valid, predictions=perfect(splits["valid"]),
    )  # fmt: skip


def test_samples_come_at_the_start_and_predictions_at_each_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra: pip install m2f-trainer[tensorboard]")
    writer = Writer()
    board = TensorBoardCallback(tb_writer=writer)
    pictures = Pictures(trainer(tmp_path, board))
    told: Any = None, TrainerState(global_step=7), TrainerControl()
    pictures.on_train_begin(*told)
    assert sorted(writer.images) == [f"train/sample_{k}" for k in range(4)]
    assert writer.images["train/sample_0"].shape == (64, 64, 3)
    pictures.on_evaluate(*told)
    both = writer.images["valid/truth_and_prediction_0"]
    half = (both.shape[1] - 6) // 2
    left, right = both[:, :half], both[:, half + 6 :]
    assert (left == right).mean() > 0.7, "perfect predictions look like the truth but for their scores"


def test_without_tensorboard_nothing_is_drawn(tmp_path: Path) -> None:
    pictures = Pictures(trainer(tmp_path))
    told: Any = None, TrainerState(global_step=7), TrainerControl()
    pictures.on_train_begin(*told)
    pictures.on_evaluate(*told)
