"""Pictures for TensorBoard: augmented samples at the start, predictions beside truth at each evaluation."""

from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from m2f_trainer.data.coco import categories_of
from m2f_trainer.data.collator import InstanceDataset
from m2f_trainer.data.pictures import draw_sample
from m2f_trainer.evaluation.gallery import beside
from m2f_trainer.training.trainer import M2FTrainer

SHOWN, LONGEST, LEAST_SCORE = 4, 480, 0.5


class Pictures(TrainerCallback):
    """Adds pictures to the writer that the Trainer's own TensorBoard callback has opened; does nothing without one."""

    def __init__(self, trainer: M2FTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first training samples as the model is shown them, with their masks."""
        writer, samples = writer_of(self.trainer), self.trainer.train_dataset
        if writer is not None and isinstance(samples, InstanceDataset):
            for index in range(min(SHOWN, len(samples))):
                picture = np.asarray(draw_sample(samples[index]))
                writer.add_image(f"train/sample_{index}", picture, state.global_step, dataformats="HWC")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first validation images, the truth on the left."""
        writer, samples = writer_of(self.trainer), self.trainer.eval_dataset
        if writer is None or not isinstance(samples, InstanceDataset):
            return
        found = {one.image_id: one.above(LEAST_SCORE) for one in self.trainer.predictions}
        names = {category.id: category.name for category in categories_of(samples.rows)}
        for index in range(min(SHOWN, len(samples))):
            row = samples.rows[index]
            picture = np.asarray(beside(row, found.get(row["image_id"]), names, LONGEST))
            writer.add_image(f"valid/truth_and_prediction_{index}", picture, state.global_step, dataformats="HWC")


def writer_of(trainer: Trainer) -> Any:
    """The open writer of the Trainer's TensorBoard callback; None where TensorBoard isn't used, or on other ranks."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            return callback.tb_writer
    return None
