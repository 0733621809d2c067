"""Faults told clearly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from m2f_trainer.data.collate import collate
from m2f_trainer.errors import DataError, TrainingError
from m2f_trainer.training.callbacks.guards import gradient_norm, read_batch, write_batch
from m2f_trainer.training.data_workers import translate_errors, without_traceback


def sample(count: int) -> dict[str, object]:
    return {
        "pixel_values": torch.zeros(3, 8, 8, dtype=torch.uint8),
        "pixel_mask": torch.ones(8, 8, dtype=torch.bool),
        "masks": [np.ones((2, 3), np.uint8)] * count,
        "boxes": torch.tensor([[1, 1, 4, 3]] * count, dtype=torch.int32).reshape(-1, 4),
        "class_labels": torch.zeros(count, dtype=torch.int64),
        "image_id": 9,
        "original_size": (8, 8),
        "resized_size": (8, 8),
    }


def test_a_batch_is_read_as_it_was_written(tmp_path: Path) -> None:
    batch = collate([sample(2), sample(0)])
    write_batch(batch, tmp_path / "batch.safetensors")
    again = read_batch(tmp_path / "batch.safetensors")
    assert again.keys() == batch.keys()
    assert [len(labels) for labels in again["class_labels"]] == [2, 0]
    for key, value in batch["mask_labels"].items():
        assert torch.equal(again["mask_labels"][key], value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_gradient_shows_in_the_norm(value: float) -> None:
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.tensor([0.0, value])
    assert not torch.isfinite(gradient_norm(model))


def test_a_full_device_names_the_levers() -> None:
    levers = r"memory is full .*per_device_train_batch_size.*gradient_checkpointing"
    with pytest.raises(TrainingError, match=levers), translate_errors([], 1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")


def test_what_is_no_fault_of_a_worker_passes_unchanged() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), translate_errors([], 1):
        raise RuntimeError("shapes differ")
    with pytest.raises(DataError, match=r"^bad$"), translate_errors([], 1):
        raise DataError("bad")


def test_a_workers_traceback_is_left_out_of_its_message() -> None:
    text = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback\n  x\nm2f_trainer.errors.DataError: bad\n"
    )
    advice = without_traceback(DataError(text))
    assert isinstance(advice, DataError)
    assert str(advice) == "bad"
    assert without_traceback(DataError("bad")) is None
