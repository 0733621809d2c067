"""A global batch has the same gradients for every split into ranks and micro-batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def gradients(folder: Path, ranks: int, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    out = folder / f"{ranks}-{batch}-{accumulation}.pt"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *launch, "-m", "tests.training.gradients_of_one_step", out, batch, accumulation]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, torch.Tensor] = torch.load(out)
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return gradients(tmp_path_factory.mktemp("one"), 1, 4, 1)


@pytest.mark.parametrize(("ranks", "batch", "accumulation"), [(2, 2, 1), (2, 1, 2), (1, 1, 4)])
def test_gradients_equal_those_of_one_process_with_the_whole_batch(
    one_process: dict[str, torch.Tensor], tmp_path: Path, ranks: int, batch: int, accumulation: int
) -> None:
    spread = gradients(tmp_path, ranks, batch, accumulation)
    assert spread.keys() == one_process.keys()
    for name, expected in one_process.items():
        difference = (spread[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert difference < 1e-5, f"{name}: {difference}"
