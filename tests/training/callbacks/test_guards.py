"""Values that are not finite are detected, and the batch that caused them can be read again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from m2f_trainer.data.collate import collate
from m2f_trainer.errors import TrainingError
from m2f_trainer.training.callbacks.guards import FiniteGuard, read_batch, write_batch


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
def test_one_bad_gradient_stops_the_run_before_the_update(value: float, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.save_pretrained = lambda *args, **kwargs: None
    model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.tensor([0.0, value])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    batch = collate([sample(1)])
    guard = FiniteGuard(lambda: [batch], lambda: torch.tensor(1.0), lambda: norm, scaled=False)
    arguments: Any = SimpleNamespace(output_dir=str(tmp_path), process_index=0, seed=0)
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite. The step's images are 9"):
        guard.on_pre_optimizer_step(arguments, SimpleNamespace(global_step=0), SimpleNamespace(), model=model)
