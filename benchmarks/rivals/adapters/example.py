"""transformers' instance segmentation example on a frozen DINOv2 (benchmarks/accuracy/stock_example.py).

AdamW with a constant learning rate, as in the example's README, so training can end at any step.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.accuracy.stock_example import ExampleDataset, collate, stock_model
from benchmarks.accuracy.stock_parts import postprocessed
from benchmarks.rivals.task import Task, serve
from m2f_trainer.data.dataset import categories_of
from m2f_trainer.data.hub_dataset import load_dataset

STOPPING = 1.0
"""CPU seconds reserved for saving the model."""


class StopAtBudget(TrainerCallback):
    """Ends the training when the process has used its CPU seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if the CPU time is used up."""
        control.should_training_stop |= time.process_time() > self.seconds


def _processor(task: Task) -> Mask2FormerImageProcessorPil:
    side = task.settings["image_size"]
    return Mask2FormerImageProcessorPil(size={"height": side, "width": side}, ignore_index=0)


def train(task: Task) -> dict[str, Any]:
    """Train until the budget is used up."""
    torch.set_num_threads(1)
    set_seed(task.seed)
    rows = load_dataset(task.dataset)["train"]
    model = stock_model(Path(task.backbone), len(categories_of(rows)), task.settings["head"])
    arguments = TrainingArguments(
        output_dir=str(Path(task.folder, "run")), max_steps=10**6, learning_rate=task.settings["learning_rate"],
        lr_scheduler_type="constant", per_device_train_batch_size=task.settings["batch"], remove_unused_columns=False,
        seed=task.seed, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=ExampleDataset(rows, _processor(task), augment=True),
        data_collator=collate, callbacks=[StopAtBudget(60 * task.minutes - STOPPING)],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(Path(task.folder, "model"))
    return {"images": trainer.state.global_step * task.settings["batch"], "steps": trainer.state.global_step}


@torch.inference_mode()
def predict(task: Task) -> list[dict[str, Any]]:
    """Predict with the example's post-processing."""
    torch.set_num_threads(1)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(Path(task.folder, "model")).eval()
    rows = load_dataset(task.dataset)["valid"]
    samples = ExampleDataset(rows, _processor(task), augment=False)
    categories = [vars(category) for category in categories_of(rows)]
    results = []
    for index in range(len(samples)):
        sample = samples[index]
        outputs = model(pixel_values=sample["pixel_values"][None])
        inputs = {name: sample[name][None] for name in ("image_id", "original_size")}
        results += [one for found in postprocessed(outputs, inputs, categories) for one in found.to_coco()]
    return results


if __name__ == "__main__":
    serve(train, predict)
