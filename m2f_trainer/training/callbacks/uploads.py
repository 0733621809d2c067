"""Uploads of checkpoints to the Hub.

The Trainer's own upload would send the whole folder, with logs and optimizer. It is refused; ours sends only the files
that `m2f_trainer.hub.upload` lists.
"""

import logging
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
    """Uploads the model of each checkpoint. A failed upload is logged, and the run continues."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Upload the checkpoint, which is complete by now."""
        if state.is_world_process_zero:
            try:
                push(Path(str(args.output_dir), f"checkpoint-{state.global_step}"), self.target)
            except SharingError as error:
                logger.warning("step %d: %s The run continues.", state.global_step, error)


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
