"""Signals at each phase of a run, sent to this process. (Runs that are signalled: tests/faults/test_signals.py.)"""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m2f_trainer.errors import RunStopped
from m2f_trainer.training.callbacks.signals import SIGNALS, StopOnSignal

ARGS: Any = SimpleNamespace(device=torch.device("cpu"), save_strategy="steps", output_dir="runs/a")


def state(epoch: float = 0.5) -> Any:
    return SimpleNamespace(global_step=7, epoch=epoch)


def control() -> Any:
    return SimpleNamespace(should_save=False)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_training_asks_for_a_save_and_then_stops(number: signal.Signals) -> None:
    with StopOnSignal() as stop:
        stop.on_train_begin(ARGS, state(), control())
        signal.raise_signal(number)
        asked = control()
        stop.on_step_end(ARGS, state(), asked)
        assert asked.should_save
        with pytest.raises(RunStopped, match=rf"stopped by {number.name}; step 7 is saved in runs/a"):
            stop.on_save(ARGS, state(), asked)


def test_without_a_signal_a_step_asks_for_nothing_and_the_old_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopOnSignal() as stop:
        stop.on_train_begin(ARGS, state(), control())
        asked = control()
        stop.on_step_end(ARGS, state(), asked)
        stop.on_save(ARGS, state(), asked)
        stop.on_train_end(ARGS, state(), asked)
        assert not asked.should_save
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_before_and_after_training_a_signal_stops_at_once() -> None:
    with StopOnSignal(), pytest.raises(RunStopped, match="stopped by SIGTERM before or after the training"):
        signal.raise_signal(signal.SIGTERM)
    with StopOnSignal() as stop:
        stop.on_train_begin(ARGS, state(), control())
        stop.on_train_end(ARGS, state(), control())
        with pytest.raises(RunStopped, match="before or after the training"):
            signal.raise_signal(signal.SIGINT)


def test_where_epochs_save_their_last_step_is_not_saved_twice() -> None:
    args: Any = SimpleNamespace(**{**vars(ARGS), "save_strategy": "epoch"})
    for epoch, saves in ((2.0, False), (2.5, True)):
        with StopOnSignal() as stop:
            stop.on_train_begin(args, state(), control())
            signal.raise_signal(signal.SIGTERM)
            asked = control()
            stop.on_step_end(args, state(epoch), asked)
            assert asked.should_save is saves
