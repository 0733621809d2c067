"""Data workers that raise, die or hang, and full memory: what was in hand is named, and the run ends in time."""

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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.errors import LEVERS, M2FError, TrainingError


class Watched(Dataset[dict[str, Any]]):
    """A dataset that notes in shared memory which sample each data worker has in hand, and names it where it fails."""

    def __init__(self, dataset: InstanceDataset, workers: int) -> None:
        self.dataset = dataset
        self.in_hand = torch.full((max(workers, 1),), -1, dtype=torch.int64)
        self.in_hand.share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample. Raises TrainingError, with the image named, where the dataset raises anything but advice."""
        with in_hand(self.in_hand, index, lambda: self.name(index)):
            return self.dataset[index]

    def name(self, index: int) -> str:
        """The name of a sample in messages."""
        return f"image {self.dataset.rows[index]['image_id']} (sample {index})"

    def suspects(self) -> list[str]:
        """Names of the samples that were begun and not finished."""
        return [self.name(index) for index in self.in_hand.tolist() if index >= 0]


@contextmanager
def in_hand(slots: Tensor, number: int, name: Callable[[], str]) -> Iterator[None]:
    """Note what a data worker has in hand, in `slots` int64 (workers,); name it where anything but advice is raised."""
    worker = get_worker_info()
    slot = worker.id if worker else 0
    slots[slot] = number
    try:
        yield
    except M2FError:
        raise
    except Exception as error:
        raise TrainingError(f"{name()} could not be loaded: {type(error).__name__}: {error}") from error
    slots[slot] = -1


def watch(loader: DataLoader[Any], timeout: int) -> DataLoader[Any]:
    """Give a data loader a time limit, and workers that leave signals to their trainer."""
    if loader.num_workers > 0:
        inner = loader.base_dataloader if isinstance(loader, DataLoaderShard) else loader  # accelerate's is a shell
        inner.timeout = timeout
        inner.worker_init_fn = QuietWorker(inner.worker_init_fn)
        multiprocessing.util.Finalize(None, end_workers, exitpriority=100)  # Python would ask them once, and wait
    return loader


class QuietWorker:
    """Starts a data worker that outlives a signal sent to all processes of a run, so that its trainer can save."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then
        self.asked = False

    def __call__(self, worker: int) -> None:
        """Runs first in a worker."""
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end_when_asked_twice)
        if self.then is not None:
            self.then(worker)

    def _end_when_asked_twice(self, *_: int | FrameType | None) -> None:
        if self.asked:
            os._exit(0)
        self.asked = True


@contextmanager
def translate_errors(datasets: Sequence[Watched], timeout: int) -> Iterator[None]:
    """Raise errors that end a run as TrainingError with advice: full memory, and data workers that die or hang.

    `datasets` may grow within the block: the Trainer adds those of its data loaders.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"the device's memory is full ({str(error).splitlines()[0]}). {LEVERS}") from error
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
    """What an error says of data workers, in our words; None when it says nothing of them.

    Whoever reads what a dead worker has sent may find the connection closed before torch notices the death.
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
    """What a worker raised, without the traceback that torch puts into its message; None when there is none."""
    message = str(error)
    if not message.startswith("Caught "):
        return None
    return type(error)(message.rsplit(f"{type(error).__module__}.{type(error).__name__}: ", 1)[-1].strip())


def forget_workers() -> None:
    """Hear no more of workers that end: torch raises an error wherever the process is at that moment."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_workers() -> None:
    """Kill this process's data workers: one that hangs would not heed a request, and hold up the exit."""
    forget_workers()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()
