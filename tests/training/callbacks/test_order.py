"""One list defines the order of callbacks, and a trainer follows it."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainerCallback

import m2f_trainer.training
from m2f_trainer.training.callbacks.order import ORDER, position
from m2f_trainer.training.callbacks.progress import ClassTable, Cost, DataWait, EvaluateAtEverySave, Lines
from m2f_trainer.training.callbacks.signals import StopOnSignal
from tests.training.test_trainer import trainer_of


def own_callbacks() -> Iterator[type]:
    """Every callback class that a module of the training room defines."""
    package = m2f_trainer.training
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for item in vars(importlib.import_module(module.name)).values():
            if isinstance(item, type) and issubclass(item, TrainerCallback) and item.__module__ == module.name:
                yield item


def test_every_callback_of_ours_has_one_row_with_a_reason() -> None:
    kinds = [kind for kind, _ in ORDER]
    assert set(own_callbacks()) <= set(kinds)
    assert len(set(kinds)) == len(kinds)
    assert all(reason for _, reason in ORDER)


class Users(TrainerCallback):
    """A user's own."""


def test_callbacks_run_in_the_order_of_the_list_however_they_were_added(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ema_decay=0.9)
    for callback in (StopOnSignal(), EarlyStoppingCallback(2), Users(), Cost(), ClassTable(), EvaluateAtEverySave()):
        trainer.add_callback(callback)
    rows = [position(callback) for callback in trainer.callback_handler.callbacks]
    assert rows == sorted(rows)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names[:4] == ["DataWait", "SeedEveryStep", "FiniteGuard", "NoStockUpload"]
    assert names.index("DefaultFlowCallback") < names.index("Users") < names.index("EvaluateAtEverySave")
    assert names.index("EvaluateAtEverySave") < names.index("StopOnSignal")


def test_a_callback_of_a_user_runs_with_the_loggers() -> None:
    assert ORDER[position(Users())][0] is TrainerCallback
    assert position(DataWait()) < position(Users()) < position(Lines())
