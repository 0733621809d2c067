"""A resumed run is the uninterrupted one, to the last bit of every loss and weight."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.folders import REAL
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
    "two ranks, rare classes": (
        {"per_device_train_batch_size": 1, "repeat_factor_threshold": 0.9, "class_weights": "balanced"}, (2, 4), 2
    ),
    "rare classes, workers": (
        {"dataloader_num_workers": 2, "repeat_factor_threshold": 0.9, "class_weights": "balanced"}, (2, 4), 1
    ),
    "two ranks": ({"per_device_train_batch_size": 1}, (2, 4), 2),
    "two ranks, workers, accumulation": (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1,
         "checkpointing_steps": 1}, (1, 2, 3), 2,
    ),
}  # fmt: skip


WEIGHTS = Path(os.environ.get("M2F_DINOV2", "no-weights"))
REAL_RUN = {
    "backbone": str(WEIGHTS), "backbone_config": None, "head_config": None, "image_height": 112, "image_width": 112,
    "num_queries": 100, "color_jitter": None, "learning_rate": 1e-4, "max_train_samples": 4, "max_eval_samples": 1,
    "per_device_train_batch_size": 1,
}  # fmt: skip
REAL_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("dsb2018_nuclei", {"tune": "full"}),
    "lora": ("coco_permissive", LORA),
    "averaged": ("coco_permissive", {"tune": "full", "ema_decay": 0.99}),
}


def check(fields: dict[str, Any], steps: tuple[int, ...], ranks: int, data: Path, folder: Path) -> None:
    whole = folder / "whole"
    ran = Started(folder / "log", options(data, whole, **fields), ranks=ranks).join(900)
    assert ran[0].status == 0, ran[0].text[-3000:]
    for step in steps:
        resumed = folder / f"from-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}", copy_function=os.link)
        again = options(data, resumed, resume_from_checkpoint=True, **fields)
        ran = Started(folder / "log", again, ranks=ranks).join(900)
        assert ran[0].status == 0, ran[0].text[-3000:]
        assert len(losses(whole)) > step
        assert losses(resumed) == losses(whole)
        assert same_weights(resumed, whole)
        shutil.rmtree(resumed)
    shutil.rmtree(whole)


@pytest.mark.parametrize("name", ["lora, workers, averaged"])
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, data: Path, tmp_path: Path) -> None:
    check({**CASES[name][0], "max_steps": 4}, (2,), 1, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_way_to_train_resumes_exactly(name: str, data: Path, tmp_path: Path) -> None:
    check(*CASES[name], data, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    not (WEIGHTS.is_dir() and REAL.is_dir()),
    reason="a real model on real images: set M2F_DINOV2 to the folder of a DINOv2 backbone, and M2F_TEST_DATA to one "
    "with dsb2018_nuclei and coco_permissive",
)
@pytest.mark.parametrize("name", REAL_CASES)
@pytest.mark.parametrize("augmentation", ["none", "strong"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_real_run_resumes_exactly_in_the_middle_and_at_the_end_of_an_epoch(
    workers: int, augmentation: str, name: str, tmp_path: Path
) -> None:
    dataset, fields = REAL_CASES[name]
    rest = {"dataloader_num_workers": workers, "augmentation": augmentation}
    check({**REAL_RUN, **fields, **rest}, (2, 4), 1, REAL / dataset, tmp_path)
