"""A data worker that raises, dies or hangs: the run ends with a status and a name, in time."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.training.checkpointing.resume import newest_complete
from tests.faults.tiny import Ran, die, options, train

BAD = 5  # the sample that does it; its image id is one more


def segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    time.sleep(1000)


def fail() -> None:
    raise ValueError("a bug in a transform")


FAULTS: dict[Callable[[], None], str] = {
    fail: "image 6 (sample 5) could not be loaded: ValueError: a bug in a transform",
    die: "a data worker died (",
    segfault: "a data worker died (",
    hang: "no batch came within 3 s (dataloader_timeout): a data worker hangs while loading image 6 (sample 5)",
}


def spoil(act: Callable[[], None], epoch: int = 1) -> None:
    """Have one sample of the second epoch act."""
    get = InstanceDataset.__getitem__

    def spoiled(self: InstanceDataset, index: int) -> object:
        if len(self) > 2 and index == BAD and int(self._epoch) == epoch:
            act()
        return get(self, index)

    patch.object(InstanceDataset, "__getitem__", spoiled).start()


def run_with(act: Callable[[], None], data: Path, folder: Path, workers: int = 1) -> Ran:
    limits = {"dataloader_num_workers": workers, "dataloader_timeout": 3}
    start = time.monotonic()
    ran = train(folder / "log", options(data, folder / "run", **limits), partial(spoil, act), timeout=60)
    assert time.monotonic() - start < 40
    return ran


@pytest.mark.parametrize("act", [fail, die, pytest.param(segfault, marks=pytest.mark.slow), hang])
def test_a_worker_that_fails_ends_the_run_and_names_the_sample(
    act: Callable[[], None], data: Path, tmp_path: Path
) -> None:
    ran = run_with(act, data, tmp_path)
    assert ran.status == 1, ran.text[-3000:]
    assert FAULTS[act] in ran.text
    assert "m2f train: " in ran.text
    assert "image 6 (sample 5)" in ran.text.split("m2f train: ")[-1]
    assert "Traceback" not in ran.text.split("m2f train: ")[-1]
    assert newest_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_an_image_that_breaks_while_training_is_named(workers: int, data: Path, tmp_path: Path) -> None:
    ran = run_with(fail, data, tmp_path, workers)
    assert ran.status == 1
    assert FAULTS[fail] in ran.text.split("m2f train: ")[-1]
