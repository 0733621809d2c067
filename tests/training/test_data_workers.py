"""Errors of data workers and full memory are raised with advice; other errors stay as they are.

Runs whose workers raise, die or hang are in tests/faults/test_workers.py.
"""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from m2f_trainer.errors import DataError, TrainingError
from m2f_trainer.training.data_workers import Watched, translate_errors, without_traceback


class Rows:
    """A dataset whose second sample cannot be read."""

    rows = ({"image_id": 7}, {"image_id": 8})

    def __len__(self) -> int:
        return 2

    def name(self, index: int) -> str:
        return f"image {self.rows[index]['image_id']} (sample {index})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 1:
            raise ValueError("a broken file")
        return {"index": index}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_sample_being_loaded_is_named_where_loading_fails(workers: int) -> None:
    dataset: Any = Rows()
    watched = Watched(dataset, workers)
    loader: DataLoader[Any] = DataLoader(watched, batch_size=None, num_workers=workers)
    with (
        pytest.raises(TrainingError, match=r"^image 8 \(sample 1\) could not be loaded: ValueError: a broken file$"),
        translate_errors([watched], 1),
    ):
        list(loader)
    assert watched.suspects() == ["image 8 (sample 1)"]


def test_a_full_device_names_the_levers() -> None:
    levers = r"memory is full .*per_device_train_batch_size.*gradient_checkpointing"
    with pytest.raises(TrainingError, match=levers), translate_errors([], 1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")


def test_what_is_no_fault_of_a_worker_passes_unchanged() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), translate_errors([], 1):
        raise RuntimeError("shapes differ")
    with pytest.raises(DataError, match=r"^bad$"), translate_errors([], 1):
        raise DataError("bad")


def test_a_workers_traceback_is_left_out_of_its_message() -> None:
    text = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback\n  x\nm2f_trainer.errors.DataError: bad\n"
    )
    advice = without_traceback(DataError(text))
    assert isinstance(advice, DataError)
    assert str(advice) == "bad"
    assert without_traceback(DataError("bad")) is None
