"""What happens beside the steps of a run: evaluation at every save, early stopping, a per-class table."""

from collections.abc import Mapping
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2f_trainer.arguments import TrainArguments
from m2f_trainer.evaluation.curves import metrics_table


class EvaluateAtEverySave(TrainerCallback):
    """Every checkpoint is evaluated, also the one that the Trainer writes at the last step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for an evaluation where a save was asked for: the Trainer evaluates first, then saves."""
        control.should_evaluate = control.should_evaluate or control.should_save


class ClassTable(TrainerCallback):
    """Logs the table of AP per class after each evaluation, on the main process."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print through the progress bar's own line, so that neither breaks the other."""
        if state.is_world_process_zero and metrics:
            from tqdm import tqdm

            prefix = next(iter(metrics)).split("_")[0] + "_"
            tqdm.write(f"\nstep {state.global_step}\n{metrics_table(metrics, prefix)}")


def run_callbacks(args: TrainArguments) -> list[TrainerCallback]:
    """The callbacks of a run of `m2f train`."""
    callbacks: list[TrainerCallback] = [EvaluateAtEverySave(), ClassTable()]
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    return callbacks
