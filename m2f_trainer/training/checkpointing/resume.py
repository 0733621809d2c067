"""Resume a run: find the checkpoint, check that the settings are the same, and adapt it where changes are allowed.

`find_checkpoint` chooses the folder, `find_start` compares fingerprints, and the callbacks at the end apply what the
Trainer would take from the checkpoint instead of the recipe.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from m2f_trainer.config.recipe import rows
from m2f_trainer.config.training_arguments import TrainArguments, resume_of
from m2f_trainer.errors import CheckpointError, ModelFolderError
from m2f_trainer.hub.model_card import CARD, is_untouched
from m2f_trainer.run_folder import (
    FINGERPRINT,
    MANIFEST,
    RECIPE,
    RESUME_STAGING,
    STATE,
    final_files,
    read_json,
    write_atomically,
)
from m2f_trainer.training.callbacks.clock import Clock
from m2f_trainer.training.checkpointing.checkpoints import checkpoints, damage, was_evaluated
from m2f_trainer.training.checkpointing.fingerprint import (
    FIXED,
    SCORED_BY,
    differences,
    has_other_optimizer,
    length_in_steps,
    same_sample,
    updates_per_epoch,
)
from m2f_trainer.training.ema import drop_averages, swap_averages
from m2f_trainer.training.optimizer import parameter_groups, rates_of

logger = logging.getLogger(__name__)


def find_checkpoint(arguments: TrainArguments) -> Path | None:
    """The checkpoint to resume from: the newest complete one, or the named one if undamaged; None for a new run.

    Processes restarted by torchrun resume from the newest complete one without being asked. Raises CheckpointError when
    the named one is damaged, when there is none, and when the folder holds another run's checkpoints.
    """
    output_dir, resume = Path(arguments.output_dir or "."), arguments.resume
    if restarted():
        found = newest_complete(output_dir)
        if found is not None or resume is True:
            return found
    if resume is False:
        refuse_other_run(output_dir, arguments.overwrite_output_dir or restarted())
        return None
    if isinstance(resume, str) and resume != "auto":
        return _undamaged(Path(resume))
    found = newest_complete(output_dir)
    if found is None and resume is True:
        raise CheckpointError(nothing_to_resume(output_dir))
    return found


def nothing_to_resume(output_dir: Path) -> str:
    """The message about a folder without a complete checkpoint."""
    return (
        f"{output_dir}: no complete checkpoint to resume from. Leave out resume_from_checkpoint for a new run, or name "
        "a checkpoint elsewhere"
    )


def recipe_to_resume(given: Mapping[str, Any]) -> Path | None:
    """The recipe of the checkpoint that these fields of a command resume from; None for a new run, or without one.

    Of the newest checkpoint whose recipe can be read: `find_checkpoint` checks the other files, and may choose an
    earlier one. Raises CheckpointError where there is no such checkpoint.
    """
    resume = resume_of(given.get("resume_from_checkpoint"))
    if isinstance(resume, str) and resume != "auto":
        refuse_to_resume(Path(resume), no_checkpoint(Path(resume)))
        return Path(resume, RECIPE) if Path(resume, RECIPE).is_file() else None
    if not resume and not restarted():
        return None
    output_dir = Path(given.get("output_dir") or rows()["output_dir"].default)
    found = [folder for _, folder in reversed(checkpoints(output_dir))]
    if not found and resume is True:
        raise CheckpointError(nothing_to_resume(output_dir))
    return next((folder / RECIPE for folder in found if is_json(folder / RECIPE)), None)


def run_of(checkpoint: Path) -> Path:
    """The run's folder that holds a checkpoint, which may be given as `.` or as a link."""
    return (checkpoint if checkpoint.name.startswith("checkpoint-") else checkpoint.resolve()).parent


def is_json(path: Path) -> bool:
    """Whether `path` is a file with a JSON object."""
    try:
        read_json(path)
    except ModelFolderError:
        return False
    return path.is_file()


def restarted() -> bool:
    """Whether torchrun has restarted this process after a rank died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def newest_complete(output_dir: Path) -> Path | None:
    """The newest undamaged checkpoint; logs which ones were skipped, and why."""
    for _, folder in reversed(checkpoints(output_dir)):
        reason = damage(folder)
        if reason is None:
            logger.warning("resuming from %s", folder)
            return folder
        logger.warning("skipped %s: %s", folder, reason)
    return None


def refuse_other_run(output_dir: Path, overwrite: bool) -> None:
    """Raise CheckpointError if the folder holds another run's checkpoints, unless `overwrite`."""
    found = checkpoints(output_dir)
    if found and not overwrite:
        raise CheckpointError(
            f"{output_dir} holds the checkpoints of another run, up to step {found[-1][0]}. Continue it with "
            "--resume_from_checkpoint true, delete them with --overwrite_output_dir true, or give another output_dir"
        )


def delete_former_run(output_dir: Path) -> None:
    """Delete the checkpoints and the final model of the run that a new one overwrites; a card edited by hand stays."""
    for _, folder in checkpoints(output_dir):
        shutil.rmtree(folder)
    card = output_dir / CARD
    kept = {CARD} if card.is_file() and not is_untouched(card.read_text(encoding="utf-8")) else set()
    for path in final_files(output_dir):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _undamaged(folder: Path) -> Path:
    refuse_to_resume(folder, no_checkpoint(folder) or damage(folder))
    return folder


def no_checkpoint(folder: Path) -> str | None:
    """Why a named folder is no checkpoint; None if it may be one."""
    if not folder.is_dir():
        return "there is no such folder"
    found = checkpoints(folder)
    return f"it is a run's folder, and not one of its checkpoints, such as {found[-1][1].name}" if found else None


def refuse_to_resume(folder: Path, reason: str | None) -> None:
    """Raise CheckpointError if there is a reason against resuming from the named folder."""
    if reason is not None:
        raise CheckpointError(
            f"{folder} cannot be resumed from: {reason}. Pass true to use the newest complete checkpoint"
        )


def check_changes(checkpoint: Path, now: Mapping[str, Any], allow_changes: bool) -> bool:
    """Whether settings have changed since the checkpoint. Raises CheckpointError with a list of changes not allowed."""
    path = checkpoint / FINGERPRINT
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {FINGERPRINT}, so the settings of its training are unknown. Start a new run "
            "from it with --init_from"
        )
    if read_json(checkpoint / RECIPE).get("save_only_model") is True:
        raise CheckpointError(
            f"{checkpoint} holds no state of the optimizer (save_only_model). Start a new run from its weights with "
            f"--init_from {checkpoint}"
        )
    then = json.loads(path.read_text(encoding="utf-8"))
    changed = differences(then, now)
    listed = "; ".join(changed.values())
    if FIXED & set(changed) or has_other_optimizer(then, now):
        raise CheckpointError(
            f"{checkpoint} is of another model, engine or optimizer: {listed}. Start a new run from its weights with "
            f"--init_from {checkpoint}"
        )
    if changed and not allow_changes:
        raise CheckpointError(
            f"{checkpoint} was trained with other settings: {listed}. Set them back, or continue at the same sample "
            "with --allow_changes true"
        )
    if changed:
        logger.warning("resuming with changes: %s", listed)
    return bool(changed)


def find_start(checkpoint: Path | None, arguments: TrainArguments, facts: Mapping[str, Any]) -> Path | None:
    """The folder that the Trainer resumes from: the checkpoint, or an adapted copy if settings have changed.

    Raises CheckpointError if they must not change, see `check_changes`.
    """
    if checkpoint is None:
        return None
    changed = check_changes(checkpoint, facts, arguments.allow_changes)
    anew = selects_by_other(checkpoint, arguments)
    state = read_json(checkpoint / STATE)
    recorded, best = state.get("best_model_checkpoint"), best_checkpoint(checkpoint, state)
    if recorded is not None and best is None:
        logger.warning("%s, the best checkpoint so far, is gone: the best is chosen among the next ones", recorded)
        anew = True
    moved = best is not None and (recorded is None or best.resolve() != Path(recorded).resolve())
    if changed or anew or moved:
        return adapted_copy(checkpoint, Path(arguments.output_dir or "."), facts, anew)
    return checkpoint


def best_checkpoint(checkpoint: Path, state: Mapping[str, Any]) -> Path | None:
    """The best checkpoint so far: beside this one, whose run may have moved, or else where its state has recorded it.

    None if there is no such folder.
    """
    beside = run_of(checkpoint) / f"checkpoint-{state.get('best_global_step')}"
    recorded = state.get("best_model_checkpoint")
    return next((one for one in (beside, *([Path(recorded)] if recorded else [])) if one.is_dir()), None)


def selects_by_other(checkpoint: Path, arguments: TrainArguments) -> bool:
    """Whether the best checkpoint is now chosen by another metric, or by its minimum instead of its maximum.

    Compared with the recipe in the checkpoint.
    """
    before = read_json(checkpoint / RECIPE)
    names = ("metric_for_best_model", "greater_is_better")
    was, now = ([values.get(name) for name in names] for values in ({**vars(arguments), **before}, vars(arguments)))
    if was == now:
        return False
    logger.warning("the best checkpoint was chosen by %s and is chosen anew by %s", was[0], now[0])
    return True


def resume_callbacks(start: Path | None) -> list[TrainerCallback]:
    """Callbacks that a run resumed from `start` needs in addition."""
    if start is None:
        return []
    step = int(json.loads((start / STATE).read_text(encoding="utf-8"))["global_step"])
    return [Resumed(step), *([NewSettings()] if start.name == RESUME_STAGING else [])]


def adapted_copy(checkpoint: Path, output_dir: Path, now: Mapping[str, Any], anew: bool = False) -> Path:
    """A folder with links to the checkpoint's files and a trainer state whose step is recounted for the new settings.

    If the step changes, logged figures are dropped, since they refer to the former count. The best checkpoint has the
    path where it is now. It is dropped, and early stopping counts anew, if the step or what figures depend on
    (`SCORED_BY`) has changed, or if it is to be chosen `anew`.
    """
    then = json.loads((checkpoint / FINGERPRINT).read_text(encoding="utf-8"))
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    step = same_sample(state["global_step"], then, now)
    recounted = step != state["global_step"]
    best = best_checkpoint(checkpoint, state)
    if best is not None:
        state |= {"best_model_checkpoint": str(best)}
    scored_by = SCORED_BY & set(differences(then, now))
    if scored_by and state.get("best_global_step") is not None:
        changed = ", ".join(sorted(scored_by))
        logger.warning("earlier figures are no measure after a change of %s: the best is chosen anew", changed)
    if recounted or anew or scored_by:
        state |= {"best_metric": None, "best_global_step": None, "best_model_checkpoint": None}
        state.get("stateful_callbacks", {}).pop(EarlyStoppingCallback.__name__, None)
    if recounted:
        state |= {"log_history": []}
    state |= {"global_step": step, "epoch": step / updates_per_epoch(now)}
    folder = output_dir / RESUME_STAGING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name not in (STATE, MANIFEST):
            (folder / path.name).symlink_to(path.resolve())
    write_atomically(folder / STATE, json.dumps(state))
    return folder


class Resumed(TrainerCallback):
    """Applies a changed interval of saves, and sets aside checkpoints of steps that are trained again."""

    def __init__(self, start: int) -> None:
        self.start: int | None = start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Recompute the intervals: the checkpoint's state holds those it was written with."""
        state.compute_steps(args, state.max_steps)
        if isinstance(args, TrainArguments) and stopped_early(state, args):
            logger.warning(
                "no further step: early stopping has ended this run (early_stopping_patience %d)",
                args.early_stopping_patience,
            )
            state.max_steps = state.global_step  # `M2FTrainer` makes no step then
            control.should_evaluate = control.should_save = False  # they were set when the checkpoint was saved

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Rename checkpoints of steps that are trained again; they are kept until the first save replaces them."""
        if self.start is not None and state.is_world_process_zero:
            for step, folder in checkpoints(Path(str(args.output_dir))):
                if step > self.start and step != state.global_step:
                    aside = folder.with_name(f"set-aside-{folder.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
                    logger.warning("%s is of an earlier branch of this run: it is now %s", folder, aside.name)
        self.start = None


def stopped_early(state: TrainerState, arguments: TrainArguments) -> bool:
    """Whether the counter of early stopping in a loaded state has reached the patience."""
    saved = cast(dict[str, Any], state.stateful_callbacks).get(EarlyStoppingCallback.__name__, {})
    without_gain = int(saved.get("attributes", {}).get("early_stopping_patience_counter", 0))
    return arguments.early_stopping_patience is not None and without_gain >= arguments.early_stopping_patience


def has_ended(start: Path | None, arguments: TrainArguments, facts: Mapping[str, Any]) -> bool:
    """Whether a run resumed from `start` makes no step: its steps, its minutes or its patience are used up."""
    if start is None:
        return False
    state = TrainerState.load_from_json(str(start / STATE))
    if arguments.restore_callback_states_from_checkpoint and stopped_early(state, arguments):
        return True
    if arguments.max_minutes is None:
        return bool(state.global_step >= length_in_steps(arguments, updates_per_epoch(facts)))
    clock = cast(dict[str, Any], state.stateful_callbacks).get(Clock.__name__, {})
    return float(clock.get("args", {}).get("passed", 0)) >= 60 * arguments.max_minutes


def evaluation_owed(start: Path) -> bool:
    """Whether a signal broke off the evaluation that was due at the step of a checkpoint."""
    state = json.loads((start / STATE).read_text(encoding="utf-8"))
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return control.get("should_evaluate") is True and not was_evaluated(start)


class OwedEvaluation(TrainerCallback):
    """Evaluates the step that a run is resumed at, and saves it again, now with its figures.

    For checkpoints whose evaluation was broken off, see `evaluation_owed`. The choice of the best checkpoint, early
    stopping and the history are then those of the uninterrupted run.
    """

    def __init__(self, trainer: Trainer, start: Path) -> None:
        self.trainer, self.start = trainer, start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate, select the best checkpoint and save, as the Trainer does after a step."""
        logger.warning("step %d: its evaluation was broken off and is made now", state.global_step)
        trainer, model = self.trainer, cast(Any, self.trainer.model)
        trainer._determine_best_metric(trainer._evaluate(None, None), None)  # it also steps a schedule of the figures
        trainer._load_rng_state(str(self.start))  # the evaluation has drawn random numbers
        trainer._save_checkpoint(model, None)
        trainer.callback_handler.on_save(args, state, control)
        control.should_evaluate = control.should_save = False


class NewSettings(TrainerCallback):
    """Applies changed settings of the optimizer, and drops the average of the weights if ema_decay is unset.

    Loading a checkpoint's optimizer restores the former values. Without the average, training continues from the raw
    weights.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the optimizer's groups and the schedule as they are at this step in a new run with these settings."""
        if isinstance(args, TrainArguments) and args.ema_decay is None:
            swap_averages(kwargs["optimizer"])
            drop_averages(kwargs["optimizer"])
        fresh = parameter_groups(model, rates_of(args))
        schedule, groups = kwargs["lr_scheduler"], kwargs["optimizer"].param_groups
        given = {} if args.deepspeed else kwargs["optimizer"].defaults  # such as betas and eps
        for group, new in zip(groups, fresh, strict=True):
            group |= {name: given[name] for name in given.keys() & group.keys() - {"lr"}}
            group["weight_decay"] = new["weight_decay"]
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = [group["lr"] for group in fresh]
            schedule.last_epoch = state.global_step
            for group, new, factor in zip(groups, fresh, schedule.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = new["lr"], new["lr"] * factor(state.global_step)
            schedule._last_lr = [group["lr"] for group in groups]  # the Trainer logs these
