"""A resumed run is the uninterrupted one, to the last bit of every loss and weight."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.tiny import Started, losses, options, same_weights

LORA = {"tune": "lora", "lora_dropout": 0.1}
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {  # fields, steps resumed at, ranks; 4 steps an epoch
    "full": ({}, (2, 4), 1),
    "frozen": ({"tune": "frozen"}, (2, 4), 1),
    "lora": (LORA, (2, 4), 1),
    "lora, workers, averaged": ({**LORA, "dataloader_num_workers": 2, "ema_decay": 0.9}, (2, 4), 1),
    "averaged, head first, layer decay": (
        {"ema_decay": 0.9, "head_first_steps": 3, "layer_decay": 0.8, "lr_scheduler_type": "step"}, (2, 4), 1
    ),
    "two ranks, averaged": ({"per_device_train_batch_size": 1, "ema_decay": 0.9}, (2,), 2),
    "workers": ({"dataloader_num_workers": 2, "dataloader_persistent_workers": False}, (2, 4), 1),
    "persistent workers": ({"dataloader_num_workers": 2}, (2, 4), 1),
    "accumulation": (
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "checkpointing_steps": 1}, (1, 2, 3, 4), 1
    ),
    "epochs, early stopping, best model": (
        {"checkpointing_steps": "epoch", "early_stopping_patience": 3, "load_best_model_at_end": True, "max_steps": 12},
        (4, 8), 1,
    ),
    "two ranks": ({"per_device_train_batch_size": 1}, (2, 4), 2),
    "two ranks, workers, accumulation": (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1,
         "checkpointing_steps": 1}, (1, 2, 3), 2,
    ),
}  # fmt: skip


def check(name: str, steps: tuple[int, ...], data: Path, folder: Path) -> None:
    fields, _, ranks = CASES[name]
    whole = folder / "whole"
    ran = Started(folder / "log", options(data, whole, **fields), ranks=ranks).join()
    assert ran[0].status == 0, ran[0].text[-3000:]
    for step in steps:
        resumed = folder / f"from-{step}"
        resumed.mkdir()
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        again = options(data, resumed, resume_from_checkpoint=True, **fields)
        ran = Started(folder / "log", again, ranks=ranks).join()
        assert ran[0].status == 0, ran[0].text[-3000:]
        assert len(losses(whole)) > step
        assert losses(resumed) == losses(whole)
        assert same_weights(resumed, whole)


@pytest.mark.parametrize("name", ["lora, workers, averaged"])
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, data: Path, tmp_path: Path) -> None:
    check(name, (2,), data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_way_to_train_resumes_exactly(name: str, data: Path, tmp_path: Path) -> None:
    check(name, CASES[name][1], data, tmp_path)
