"""Finished runs that many tests read; no test changes them."""

from pathlib import Path

import pytest

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.training.run import train
from tests.training.runs import write_tiny


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("whole")
    train(load_recipe([str(write_tiny(folder))]))
    return folder


@pytest.fixture(scope="session")
def tiled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps on tiles of 56 pixels, which is evaluated on tiles of 48."""
    folder = tmp_path_factory.mktemp("tiled")
    fields = {"tile_size": 56, "eval_tile_size": 48, "tile_overlap": 0.25, "augmentation": "light", "copy_paste": 0.5}
    train(load_recipe([str(write_tiny(folder, **fields))]))
    return folder
