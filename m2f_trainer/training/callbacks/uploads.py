"""Uploads of checkpoints to the Hub.

The Trainer's own upload would send the whole folder, with logs and optimizer. It is refused; ours sends only the files
that `m2f_trainer.hub.upload` lists.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError, SharingError
from m2f_trainer.hub.upload import Target, push

logger = logging.getLogger(__name__)


def hub_target(args: TrainArguments) -> Target:
    """The repository of a recipe, by default one with the name of the output folder."""
    return Target(
        args.hub_model_id or Path(str(args.output_dir)).name,
        private=bool(args.hub_private_repo),
        revision=args.hub_revision,
    )


class PushEverySave(TrainerCallback):
    """Uploads the model of a checkpoint in a thread of the main process, so that no rank waits for the Hub.

    A checkpoint that is saved while another is uploaded is left out; it is logged, as a failed upload is. The end of
    the run uploads the final model in any case.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.step = 0
        self.thread: threading.Thread | None = None

    @property
    def uploading(self) -> int | None:
        """The step whose checkpoint is being uploaded; None if there is none."""
        return self.step if self.thread is not None and self.thread.is_alive() else None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start to upload the checkpoint, which is complete by now."""
        if not state.is_world_process_zero:
            return
        if self.uploading is not None:
            logger.warning("step %d is not uploaded: step %d still is.", state.global_step, self.step)
            return
        self.step = state.global_step
        folder = Path(str(args.output_dir), f"checkpoint-{self.step}")
        self.thread = threading.Thread(target=self._upload, args=(folder, self.step), daemon=True)
        self.thread.start()

    def _upload(self, folder: Path, step: int) -> None:
        try:
            push(folder, self.target)
        except Exception as error:  # a thread's errors would end in a traceback on the terminal
            logger.warning("step %d: %s The run continues.", step, error)

    def wait(self) -> None:
        """Wait for the upload that is running."""
        if self.thread is not None:
            self.thread.join()


def running_uploads(callbacks: Iterable[TrainerCallback]) -> list[PushEverySave]:
    """Those of a run's callbacks that are uploading a checkpoint now."""
    return [one for one in callbacks if isinstance(one, PushEverySave) and one.uploading is not None]


@contextmanager
def report_broken_uploads(callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """If the block raises, which ends the run, log the upload that the end of the process will break off."""
    try:
        yield
    except BaseException:
        for one in running_uploads(callbacks):
            logger.warning("step %d: the run ends before the checkpoint is uploaded.", one.step)
        raise


class NoStockUpload(TrainerCallback):
    """Stops the Trainer's own upload before its first request."""

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises SharingError."""
        raise SharingError(_upload_advice(args))


def refuse_stock_upload(args: TrainingArguments) -> None:
    """Raise RecipeError if push_to_hub is set for the Trainer: its constructor would create the repository."""
    if args.push_to_hub:
        raise RecipeError(_upload_advice(args))


def _upload_advice(args: TrainingArguments) -> str:
    folder = args.output_dir
    return (
        f"push_to_hub: transformers' Trainer would upload all of {folder}, logs included. Leave it out. After "
        f'trainer.train(), call trainer.save_model() and m2f_trainer.hub.upload.push("{folder}", "NAME/MODEL"), '
        f"or run m2f push {folder} NAME/MODEL: they send the model with card and licences, and nothing else"
    )


def upload_callbacks(args: TrainArguments) -> list[TrainerCallback]:
    """The callback that uploads at every save, if the recipe asks for it."""
    wanted = args.push_to_hub and args.hub_strategy == HubStrategy.EVERY_SAVE
    return [PushEverySave(hub_target(args))] if wanted else []
