"""Run under torchrun: one optimizer step of M2FTrainer on four images, whose gradients rank 0 writes to a file.

torchrun --nproc_per_node N -m tests.training.gradients_of_one_step OUT PER_DEVICE_BATCH ACCUMULATION
"""

import sys
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.training.trainer import M2FTrainer
from tests.model.tiny import images, tiny_model

COUNTS = (3, 0, 1, 2)  # objects of each image


class FourImages(Dataset[dict[str, Any]]):
    """Noise with rectangles."""

    def __len__(self) -> int:
        return len(COUNTS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng(index)
        corners = random.integers(0, 30, (COUNTS[index], 2))
        sizes = random.integers(8, 30, (COUNTS[index], 2))
        return {
            "pixel_values": images(4)[index],
            "pixel_mask": torch.ones(64, 64, dtype=torch.bool),
            "masks": [np.ones((height, width), np.uint8) for width, height in sizes],
            "boxes": torch.tensor(np.concatenate([corners, corners + sizes], axis=1), dtype=torch.int32),
            "class_labels": torch.tensor(random.integers(0, 2, COUNTS[index])),
            "image_id": index,
            "original_size": (64, 64),
            "resized_size": (64, 64),
        }


class KeepGradients(TrainerCallback):
    """Writes the gradients just before the first optimizer step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if state.is_world_process_zero:
            torch.save(gradients, self.path)


class NoSave(TrainerCallback):
    """The Trainer saves at the last step; here only the gradients matter."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False


RANDOM_POINTS = "m2f_trainer.model.criterion.random_points"


def same_points(count: int, each: int, like: torch.Tensor) -> torch.Tensor:
    """For `RANDOM_POINTS`: the same points for every image and pair, in any distribution over batches and ranks."""
    points = torch.from_numpy(np.random.default_rng(1).random((1, each, 2))).to(like)
    return points.expand(count, each, 2)


def main() -> None:
    out, batch, accumulation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    arguments = TrainArguments(
        output_dir=f"{out}.run", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=1, max_grad_norm=0.0, dataloader_num_workers=0, report_to="none", use_cpu=True, bf16=False,
        checkpointing_steps="1000", load_best_model_at_end=False, disable_tqdm=True,
    )  # fmt: skip
    data: Any = FourImages()
    trainer = M2FTrainer(
        tiny_model(discrimination_weight=5.0).double(),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[KeepGradients(out), NoSave()],
    )
    with patch(RANDOM_POINTS, same_points):
        trainer.train()


if __name__ == "__main__":
    main()
