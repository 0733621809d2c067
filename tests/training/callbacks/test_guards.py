"""Values that are not finite are noticed, and the batch that led to them can be read again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from m2f_trainer.data.collate import collate
from m2f_trainer.training.callbacks.guards import gradient_norm, read_batch, write_batch


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
