"""A small model, dataset and recipe, and the `m2f` command as a function."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from m2f_trainer.cli.main import main
from m2f_trainer.data.synthetic import SHAPES, write_sample
from tests.faults.tiny import options
from tests.model.tiny import tiny_model


@dataclass(frozen=True)
class Ran:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


Command = Callable[..., Ran]


@pytest.fixture
def m2f(capfd: pytest.CaptureFixture[str]) -> Command:
    """`m2f ARGUMENTS` in this process."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        status = main([str(one) for one in arguments])
        return Ran(status, *capfd.readouterr())

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a saved model with the classes of `dataset`."""
    folder = tmp_path / "model"
    classes = [{"id": key, "name": name} for name, (key, _, _) in SHAPES.items()]
    tiny_model(categories=classes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("dataset") / "data", images=(4, 2, 0))


@pytest.fixture
def dataset(_dataset: Path) -> Path:
    """A dataset of four training and two validation images; tests don't change it."""
    return _dataset


@pytest.fixture
def photo(_dataset: Path) -> Path:
    """One image."""
    return next((_dataset / "valid").glob("*.jpg"))


@pytest.fixture
def recipe(dataset: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of a tiny run with these fields, and returns its path."""

    def write(**fields: Any) -> Path:
        return Path(options(dataset, tmp_path / "run", **{"max_steps": 1, "checkpointing_steps": 1, **fields})[1])

    return write


def change(path: Path, **values: Any) -> None:
    """Replace values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")
