"""Shared by the fault tests: a dataset, and undisturbed runs on it."""

from pathlib import Path

import pytest

from tests.faults.tiny import CANARY, Started, dataset, options, train


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset."""
    return dataset(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def whole(data: Path) -> Path:
    """An undisturbed run of six steps with checkpoints at 2, 4 and 6, and a Hub token in its environment."""
    output = data.parent / "whole"
    ran = train(data.parent / "whole.log", options(data, output), HF_TOKEN=CANARY)
    assert ran.status == 0, ran.text[-3000:]
    return output


@pytest.fixture(scope="session")
def whole_of_two(data: Path) -> Path:
    """The same on two ranks."""
    output = data.parent / "whole_of_two"
    ran = Started(data.parent / "two.log", options(data, output, per_device_train_batch_size=1), ranks=2).join()
    assert [one.status for one in ran] == [0, 0], ran[0].text[-3000:]
    return output
