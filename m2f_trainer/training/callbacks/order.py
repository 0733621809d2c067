"""The order in which callbacks run at each event of a training, with the reason for each place.

transformers calls callbacks in the order of its list. `M2FTrainer.add_callback` keeps that list sorted by `ORDER`, so
the order does not depend on who adds a callback, or when.
"""

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from m2f_trainer.training.callbacks.clock import Clock
from m2f_trainer.training.callbacks.guards import FiniteGuard
from m2f_trainer.training.callbacks.pictures import Pictures
from m2f_trainer.training.callbacks.progress import (
    Bars,
    ClassTable,
    Cost,
    DataWait,
    EvaluateAtEverySave,
    Lines,
    SeedEveryStep,
)
from m2f_trainer.training.callbacks.signals import StopOnSignal
from m2f_trainer.training.callbacks.uploads import NoStockUpload, PushEverySave
from m2f_trainer.training.checkpointing.resume import NewSettings, OwedEvaluation, Resumed
from m2f_trainer.training.ema import Average

ORDER: tuple[tuple[type[TrainerCallback], str], ...] = (
    (DataWait, "its clock must stop before another callback takes time; it adds data_wait to a log before it is sent"),
    (SeedEveryStep, "seeds before another callback draws a random number"),
    (FiniteGuard, "ends the run before another callback sees gradients that are not finite"),
    (NoStockUpload, "raises before another callback starts an upload"),
    (Clock, "sets the step's learning rates before a logger reads them"),
    (DefaultFlowCallback, "decides whether to log, evaluate and save; the rows below read and change that"),
    (TrainerCallback, "all others: the loggers of report_to, then the user's own, in the order they were added"),
    (EvaluateAtEverySave, "reads should_save as transformers and the user's callbacks leave it"),
    (ClassTable, "prints an evaluation after the loggers have it"),
    (Cost, "counts the time that the rows below take at a run's start"),
    (EarlyStoppingCallback, "stops after the evaluation has been logged and printed"),
    (PushEverySave, "uploads a checkpoint before StopOnSignal may end the run"),
    (Resumed, "sets aside later checkpoints before StopOnSignal may end the run"),
    (NewSettings, "sets changed rates, and drops an average that is switched off, before Average acts"),
    (StopOnSignal, "saves without an evaluation, so after EvaluateAtEverySave; ends the run, so after on_save above"),
    (Bars, "progress bars: no other callback depends on them"),
    (Lines, "one line for each log, with what the rows above added to it"),
    (Average, "takes the weights last, after every callback that could change them"),
    (Pictures, "draws after the loggers have opened, and takes the longest"),
    (OwedEvaluation, "evaluates once the weights, the loggers and all rows above are as they are during training"),
)


def position(callback: TrainerCallback) -> int:
    """The row of `ORDER` that a callback belongs to."""
    kinds = [kind for kind, _ in ORDER]
    own = next((kind for kind in kinds if kind is not TrainerCallback and isinstance(callback, kind)), TrainerCallback)
    return kinds.index(own)
