"""Pictures for the loggers: augmented training samples at the start, predictions at each evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import categories_of
from m2f_trainer.distributed import from_main
from m2f_trainer.evaluation.gallery import side_by_side
from m2f_trainer.inference.instances import Instances
from m2f_trainer.viz.overlay import draw_sample

SHOWN, LONGEST, LEAST_SCORE = 4, 480, 0.5

NamedPictures: TypeAlias = Mapping[str, NDArray[np.uint8]]
"""Pictures (H, W, 3) by name in the logger."""


class Pictures(TrainerCallback):
    """Sends pictures to the loggers of `report_to`; without a logger that accepts them none are drawn.

    The main rank draws and sends. The others wait outside of the group's collectives, which have a time limit: a large
    image, a slow disk or a slow server of a logger would otherwise end the run.

    `predictions` returns those of the latest evaluation, `callbacks` all callbacks of the Trainer.
    """

    def __init__(
        self,
        train: object,
        valid: object,
        predictions: Callable[[], Sequence[Instances]],
        callbacks: Callable[[], Sequence[TrainerCallback]],
    ) -> None:
        self.train, self.valid = train, valid
        self.predictions, self.callbacks = predictions, callbacks

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Send the first training samples as the model gets them, with their masks."""
        samples = self.train
        if isinstance(samples, InstanceDataset):
            shown = range(min(SHOWN, len(samples)))
            self._send(lambda: {f"train/sample_{k}": np.asarray(draw_sample(samples[k])) for k in shown}, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Send the first validation images with annotations on the left and predictions on the right."""
        samples = self.valid
        if isinstance(samples, InstanceDataset):
            self._send(lambda: self._predictions(samples), state)

    def _predictions(self, samples: InstanceDataset) -> NamedPictures:
        found = {one.image_id: one.above(LEAST_SCORE) for one in self.predictions()}
        names = {category.id: category.name for category in categories_of(samples.rows)}
        rows = [samples.rows[index] for index in range(min(SHOWN, len(samples.rows)))]
        return {
            f"valid/truth_and_prediction_{index}": np.asarray(
                side_by_side(row, found.get(row["image_id"]), names, LONGEST)
            )
            for index, row in enumerate(rows)
        }

    def _send(self, draw: Callable[[], NamedPictures], state: TrainerState) -> None:
        loggers = [one for one in self.callbacks() if isinstance(one, tuple(_SENDERS))]

        def draw_and_send() -> None:
            pictures = draw()
            for logger in loggers:
                send = next(send for kind, send in _SENDERS.items() if isinstance(logger, kind))
                send(logger, pictures, state.global_step)

        if loggers:
            from_main(draw_and_send)


def _to_tensorboard(logger: TensorBoardCallback, pictures: NamedPictures, step: int) -> None:
    if logger.tb_writer is not None:
        for name, picture in pictures.items():
            logger.tb_writer.add_image(name, picture, step, dataformats="HWC")


def _to_wandb(_: WandbCallback, pictures: NamedPictures, step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log({name: wandb.Image(picture) for name, picture in pictures.items()} | {"train/global_step": step})


def _to_trackio(_: TrackioCallback, pictures: NamedPictures, step: int) -> None:
    import trackio

    if trackio.context_vars.current_run.get() is not None:
        trackio.log({name: trackio.Image(picture) for name, picture in pictures.items()} | {"train/global_step": step})


def _to_mlflow(_: MLflowCallback, pictures: NamedPictures, step: int) -> None:
    import mlflow

    if mlflow.active_run() is not None:
        for name, picture in pictures.items():
            mlflow.log_image(picture, key=name, step=step)


_SENDERS: Mapping[type[TrainerCallback], Callable[[Any, NamedPictures, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    TrackioCallback: _to_trackio,
    MLflowCallback: _to_mlflow,
}
"""Callback of a logger -> function that sends pictures to it. Its package is imported only when it is used."""
