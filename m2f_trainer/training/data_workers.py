"""Errors of data workers, and full device memory, raised with advice.

When a data worker raises, dies or hangs, the run ends within `dataloader_timeout`, and the sample being loaded is
reported.
"""

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, Dataset, get_worker_info

from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.errors import MEMORY_ADVICE, M2FError, TrainingError


class Watched(Dataset[dict[str, Any]]):
    """A dataset that records in shared memory which sample each data worker is loading, so that errors can name it."""

    def __init__(self, dataset: InstanceDataset, workers: int) -> None:
        self.dataset = dataset
        self.loading = torch.full((max(workers, 1),), -1, dtype=torch.int64)  # sample index by worker, -1 for none
        self.loading.share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the dataset."""
        self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample. An error that is not an M2FError is raised as TrainingError with the name of the image."""
        worker = get_worker_info()
        slot = worker.id if worker else 0
        self.loading[slot] = index
        try:
            sample = self.dataset[index]
        except M2FError:
            raise
        except Exception as error:
            raise TrainingError(f"{self.name(index)} could not be loaded: {type(error).__name__}: {error}") from error
        self.loading[slot] = -1
        return sample

    def name(self, index: int) -> str:
        """The name of a sample in messages."""
        return self.dataset.name(index)

    def suspects(self) -> list[str]:
        """Names of the samples whose loading was started and not finished."""
        return [self.name(index) for index in self.loading.tolist() if index >= 0]


def watch(loader: DataLoader[Any], timeout: int) -> DataLoader[Any]:
    """Set a data loader's time limit in seconds, and make its workers leave signals to the training process."""
    if loader.num_workers > 0:
        inner = loader.base_dataloader if isinstance(loader, DataLoaderShard) else loader  # accelerate wraps it
        inner.timeout = timeout
        inner.worker_init_fn = QuietWorker(inner.worker_init_fn)
        # at exit Python itself would send SIGTERM once, and wait
        multiprocessing.util.Finalize(None, end_workers, exitpriority=100)
    return loader


class QuietWorker:
    """Worker initialisation that keeps a data worker alive after a signal to all processes of a run.

    The training process can then finish its step and save. A second SIGTERM ends the worker.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then
        self.terminated = False

    def __call__(self, worker: int) -> None:
        """Install the signal handlers, then call the original initialisation."""
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end_at_second_signal)
        if self.then is not None:
            self.then(worker)

    def _end_at_second_signal(self, *_: int | FrameType | None) -> None:
        if self.terminated:
            os._exit(0)
        self.terminated = True


@contextmanager
def translate_errors(datasets: Sequence[Watched], timeout: int) -> Iterator[None]:
    """Raise errors that end a run as TrainingError with advice: full memory, and data workers that die or hang.

    `datasets` may grow within the block: the Trainer adds those of its data loaders.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"the device's memory is full ({str(error).splitlines()[0]}). {MEMORY_ADVICE}") from error
    except M2FError as error:
        advice = without_traceback(error)
        if advice is None:
            raise
        raise advice from error
    except (RuntimeError, OSError, EOFError) as error:
        forget_workers()
        fault = worker_fault(error, timeout)
        if fault is None:
            raise
        end_workers()
        suspects = [name for dataset in datasets for name in dataset.suspects()]
        raise TrainingError(
            f"{fault} while loading {' or '.join(suspects) or 'no sample'}. Look at these images and annotations. "
            "With --dataloader_num_workers 0 the error shows in the training process itself"
        ) from error


def worker_fault(error: Exception, timeout: int) -> str | None:
    """A description of a data worker's death or time-out, or None for an error of another kind.

    Reading a batch from a dead worker may fail with a closed connection before torch notices the death.
    """
    message = str(error).strip()
    if "DataLoader timed out" in message:
        return f"no batch came within {timeout} s (dataloader_timeout): a data worker hangs"
    if "DataLoader worker" in message and ("exited unexpectedly" in message or "killed by signal" in message):
        return f"a data worker died ({message.splitlines()[0].strip()})"
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    if not isinstance(error, RuntimeError) and any("multiprocessing" in file for file in files):
        return f"a data worker died ({type(error).__name__} while its batch was read)"
    return None


def without_traceback(error: M2FError) -> M2FError | None:
    """An error raised in a worker, without the traceback that torch adds to its message; None if there is none."""
    message = str(error)
    if not message.startswith("Caught "):
        return None
    return type(error)(message.rsplit(f"{type(error).__module__}.{type(error).__name__}: ", 1)[-1].strip())


def forget_workers() -> None:
    """Ignore further deaths of workers: torch would raise an error at whatever statement is being executed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_workers() -> None:
    """Kill this process's data workers: one that hangs would not react to SIGTERM and would delay the exit."""
    forget_workers()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()
