"""A signal in any phase: the step is saved, the status is 75, and the run that is resumed is the same run."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from m2f_trainer.run_folder import METRICS, read_metrics
from m2f_trainer.training.callbacks import signals
from m2f_trainer.training.checkpointing import checkpoints
from m2f_trainer.training.checkpointing.resume import newest_complete
from m2f_trainer.training.trainer import M2FTrainer
from tests.faults.tiny import Ran, Started, at_step, losses, options, same_weights, stop_self, train

PHASES = {"training": 3, "evaluation": 4, "save": 4}  # the step that is saved
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def signal_in(phase: str, number: int, rank: int | None = 0) -> None:
    """Have this process, if it is that rank, send itself a signal in a phase after step 2; None is every rank."""
    if rank not in (None, int(os.environ.get("RANK", "0"))):
        return
    act = partial(stop_self, number)
    if phase == "training":
        at_step(2, act, "on_step_begin")
    elif phase == "evaluation":
        at_step(4, act, "on_prediction_step")
    else:
        name = "write_manifest" if os.environ.get("RANK", "0") == "0" else "require_finite"  # only rank 0 writes
        usual, calls = vars(checkpoints)[name], []

        def with_signal(subject: object) -> None:
            calls.append(subject)
            if len(calls) == 2:
                act()
            usual(subject)

        patch.object(checkpoints, name, with_signal).start()


def check_saved(ran: list[Ran], output: Path, phase: str) -> None:
    assert [one.status for one in ran] == [75] * len(ran), ran[0].text[-3000:]
    newest = newest_complete(output)
    assert newest is not None
    assert newest.name == f"checkpoint-{PHASES[phase]}"
    figures = read_metrics(newest / METRICS)
    assert ("eval_map" in figures) is (phase != "training"), figures
    assert figures.get("evaluated", True) is (phase != "training"), "a stop between evaluations does not wait for one"
    assert f"step {PHASES[phase]} is saved in {output}. Continue with --resume_from_checkpoint true" in ran[0].text


@pytest.mark.parametrize("phase", ["training", "save"])
def test_a_signal_saves_and_ends_with_status_75(phase: str, data: Path, whole: Path, tmp_path: Path) -> None:
    number = SIGNALS[list(PHASES).index(phase)]
    output = tmp_path / "run"
    ran = train(tmp_path / "log", options(data, output), partial(signal_in, phase, number))
    check_saved([ran], output, phase)
    if phase == "training":
        assert train(tmp_path / "log", options(data, output, resume_from_checkpoint=True)).status == 0
        assert same_weights(output, whole)
        assert losses(output) == losses(whole)


def test_one_signalled_rank_of_two_stops_both(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = options(data, output, per_device_train_batch_size=1)
    ran = Started(tmp_path / "log", arguments, partial(signal_in, "training", signal.SIGTERM, 1), ranks=2).join()
    check_saved(ran, output, "training")


def signal_in_a_long_evaluation(rank: int) -> None:
    """The first batch of the second evaluation takes longer than the grace, and this rank gets a signal in it."""
    patch.object(signals, "GRACE_SECONDS", 0.2).start()
    usual, calls = M2FTrainer.prediction_step, []

    def slow(self: M2FTrainer, *arguments: object, **options: object) -> object:
        calls.append(self.state.global_step)
        if self.state.global_step == 4 and calls.count(4) == 1:
            if rank == int(os.environ.get("RANK", "0")):
                stop_self()
            time.sleep(0.5)
        return usual(self, *arguments, **options)  # type: ignore[arg-type]

    patch.object(M2FTrainer, "prediction_step", slow).start()


def history(output: Path) -> dict[str, Any]:
    """The evaluations and the best checkpoint of a finished run."""
    state = json.loads((output / "trainer_state.json").read_text())
    evaluations = [(one["step"], one["eval_map"]) for one in state["log_history"] if "eval_map" in one]
    return {"evaluations": evaluations, "best": (state["best_global_step"], state["best_metric"])}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_breaks_a_long_evaluation_off_and_the_resumed_run_makes_it(
    ranks: int, data: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A scheduler kills the run before such an evaluation ends."""
    output = tmp_path / "run"
    arguments = options(data, output, per_device_train_batch_size=2 // ranks, per_device_eval_batch_size=1)
    ran = Started(tmp_path / "log", arguments, partial(signal_in_a_long_evaluation, ranks - 1), ranks=ranks).join()
    assert [one.status for one in ran] == [75] * ranks, ran[0].text[-3000:]
    assert newest_complete(output) == output / "checkpoint-4"
    assert read_metrics(output / "checkpoint-4" / METRICS) == {"step": 4, "evaluated": False}
    arguments = options(data, output, per_device_train_batch_size=2 // ranks, resume_from_checkpoint=True)
    again = Started(tmp_path / "log", arguments, ranks=ranks).join()
    assert [one.status for one in again] == [0] * ranks, again[0].text[-3000:]
    whole = request.getfixturevalue("whole" if ranks == 1 else "whole_of_two")
    assert same_weights(output, whole)
    assert losses(output) == losses(whole)
    assert history(output) == history(whole)
    found, expected = (read_metrics(folder / "checkpoint-4" / METRICS) for folder in (output, whole))
    assert {key: value for key, value in found.items() if "ma" in key} == {
        key: value for key, value in expected.items() if "ma" in key
    }


def rates(output: Path) -> list[tuple[int, float]]:
    """The learning rate of each step of a finished run."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["learning_rate"]) for entry in log if "learning_rate" in entry]


@pytest.mark.slow
def test_an_evaluation_that_is_made_later_counts_for_a_schedule_of_the_figures(data: Path, tmp_path: Path) -> None:
    fields = {
        "lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0, "per_device_eval_batch_size": 1,
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 10, "threshold_mode": "abs"}, "checkpointing_steps": 2,
    }  # fmt: skip
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert train(tmp_path / "log", options(data, whole, **fields)).status == 0
    assert len({rate for _, rate in rates(whole)}) == 2, "it falls after the second evaluation, at step 4"
    ran = train(tmp_path / "log", options(data, output, **fields), partial(signal_in_a_long_evaluation, 0))
    assert ran.status == 75, ran.text[-3000:]
    again = train(tmp_path / "log", options(data, output, resume_from_checkpoint=True, **fields))
    assert again.status == 0, again.text[-3000:]
    assert rates(output) == rates(whole)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_data_workers_alive(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    to_all = partial(at_step, 2, partial(os.killpg, 0, signal.SIGTERM))
    ran = train(tmp_path / "log", options(data, output, dataloader_num_workers=2), to_all)
    check_saved([ran], output, "training")


def twice() -> None:
    stop_self()
    time.sleep(1.2)
    stop_self()


def early() -> None:
    """A signal while the model is built."""
    patch("m2f_trainer.training.run.build_recipe_model", lambda *_: stop_self()).start()


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(data: Path, tmp_path: Path) -> None:
    ran = train(tmp_path / "log", options(data, tmp_path / "run"), partial(at_step, 3, twice))
    assert ran.status == 128 + signal.SIGTERM
    assert newest_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def test_a_signal_before_the_training_ends_it_at_once(data: Path, tmp_path: Path) -> None:
    ran = train(tmp_path / "log", options(data, tmp_path / "run"), early)
    assert ran.status == 75
    assert "m2f train: stopped by SIGTERM before or after the training; no progress is lost" in ran.text


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("turn", range(2))
def test_every_signal_in_every_phase_of_one_process(
    turn: int, phase: str, number: int, data: Path, tmp_path: Path
) -> None:
    rhythm = {"dataloader_num_workers": 2 * turn}
    ran = train(tmp_path / "log", options(data, tmp_path / "run", **rhythm), partial(signal_in, phase, number))
    check_saved([ran], tmp_path / "run", phase)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_every_signal_in_every_phase_to_one_rank_of_two(
    phase: str, number: int, rank: int, data: Path, tmp_path: Path
) -> None:
    arguments = options(data, tmp_path / "run", per_device_train_batch_size=1)
    ran = Started(tmp_path / "log", arguments, partial(signal_in, phase, number, rank), ranks=2).join()
    check_saved(ran, tmp_path / "run", phase)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(4))
def test_a_signal_to_both_ranks(turn: int, data: Path, tmp_path: Path) -> None:
    arguments, phase = options(data, tmp_path / "run", per_device_train_batch_size=1), list(PHASES)[turn % 3]
    ran = Started(tmp_path / "log", arguments, partial(signal_in, phase, signal.SIGTERM, None), ranks=2).join()
    check_saved(ran, tmp_path / "run", phase)
