"""Pictures of samples and predictions reach the loggers in use, and nothing is drawn where there are none."""

import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.transforms import TrainTransform
from m2f_trainer.distributed import leave
from m2f_trainer.training.callbacks.pictures import Pictures
from tests.evaluation.truth import perfect
from tests.ranks import run_two_ranks

TOLD: Any = None, TrainerState(global_step=7), TrainerControl()


class Writer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.images: dict[str, np.ndarray] = {}

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        assert (step, dataformats) == (7, "HWC")
        self.images[name] = picture


def pictures_for(folder: Path, *callbacks: Any) -> Pictures:
    splits = load_coco(write_sample(folder / "data", images=(5, 2, 0)))
    samples, valid = (
        InstanceDataset(splits[name], TrainTransform(64, 64), categories_of(splits["train"]))
        for name in ("train", "valid")
    )
    return Pictures(samples, valid, lambda: perfect(splits["valid"]), lambda: callbacks)


def test_samples_come_at_the_start_and_predictions_at_each_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra: pip install m2f-trainer[tensorboard]")
    writer = Writer()
    board = TensorBoardCallback(tb_writer=writer)
    pictures = pictures_for(tmp_path, board)
    pictures.on_train_begin(*TOLD)
    assert sorted(writer.images) == SAMPLES
    assert writer.images["train/sample_0"].shape == (64, 64, 3)
    pictures.on_evaluate(*TOLD)
    both = writer.images["valid/truth_and_prediction_0"]
    half = (both.shape[1] - 6) // 2
    left, right = both[:, :half], both[:, half + 6 :]
    assert (left == right).mean() > 0.7, "perfect predictions look like the truth but for their scores"


SAMPLES = [f"train/sample_{k}" for k in range(4)]


def fake_packages(monkeypatch: pytest.MonkeyPatch, running: bool) -> dict[str, list[str]]:
    """The three loggers' packages as far as they are used, and the names of what each was given."""
    got: dict[str, list[str]] = {"wandb": [], "trackio": [], "mlflow": []}
    run = object() if running else None

    def log(package: str) -> Any:
        return lambda values: got[package].extend(
            name for name, value in values.items() if isinstance(value, np.ndarray)
        )

    wandb = SimpleNamespace(run=run, Image=lambda picture: picture, log=log("wandb"))
    context = SimpleNamespace(current_run=SimpleNamespace(get=lambda: run))
    trackio = SimpleNamespace(context_vars=context, Image=lambda picture: picture, log=log("trackio"))
    mlflow = SimpleNamespace(active_run=lambda: run, log_image=lambda _, key, step: got["mlflow"].append(key))
    for name, package in (("wandb", wandb), ("trackio", trackio), ("mlflow", mlflow)):
        monkeypatch.setitem(sys.modules, name, package)
    return got


@pytest.mark.parametrize("running", [True, False])
def test_pictures_go_to_wandb_trackio_and_mlflow_while_their_run_is_open(
    running: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = fake_packages(monkeypatch, running)
    loggers = [object.__new__(kind) for kind in (WandbCallback, TrackioCallback, MLflowCallback)]
    loggers[2]._auto_end_run = False  # what it looks at when it is thrown away
    pictures_for(tmp_path, *loggers).on_train_begin(*TOLD)
    assert got == dict.fromkeys(got, SAMPLES if running else [])


def draw_slowly(rank: int, folder: Path) -> None:
    """A rank with a logger, whose server takes longer than the time limit of the group's collectives."""
    sys.stderr = (folder / f"{rank}.log").open("w", buffering=1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    context = SimpleNamespace(current_run=SimpleNamespace(get=object))
    names: list[str] = []

    def log(values: dict[str, Any]) -> None:
        time.sleep(5)
        names.extend(values)

    sys.modules["trackio"] = SimpleNamespace(context_vars=context, Image=lambda picture: picture, log=log)  # type: ignore[assignment]
    pictures_for(folder / str(rank), object.__new__(TrackioCallback)).on_train_begin(*TOLD)
    dist.all_reduce(torch.ones(1))
    leave()
    (folder / f"{rank}.txt").write_text(" ".join(names))


def test_other_ranks_draw_nothing_and_wait_beyond_the_limit_of_collectives(tmp_path: Path) -> None:
    run_two_ranks(draw_slowly, tmp_path, 120)
    assert (tmp_path / "0.txt").read_text().split() == [*SAMPLES, "train/global_step"]
    assert (tmp_path / "1.txt").read_text() == ""


def test_without_a_logger_nothing_is_drawn(tmp_path: Path) -> None:
    pictures = pictures_for(tmp_path)
    pictures.on_train_begin(*TOLD)
    pictures.on_evaluate(*TOLD)
