"""A rank that is killed: the others end, and the run that is started again goes on by itself."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.tiny import Started, at_step, die, losses, options, same_weights

ROOT = Path(__file__).parents[2]


def die_as_rank_1() -> None:
    if os.environ["RANK"] == "1":
        at_step(3, die)


def test_when_one_rank_dies_the_other_ends_and_both_go_on_when_restarted(
    data: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    arguments = options(data, tmp_path / "run", per_device_train_batch_size=1)
    ran = Started(tmp_path / "log", arguments, die_as_rank_1, ranks=2).join()
    assert [one.status for one in ran] == [1, -signal.SIGKILL]
    ran = Started(tmp_path / "log", arguments, ranks=2, TORCHELASTIC_RESTART_COUNT="1").join()
    assert [one.status for one in ran] == [0, 0], ran[0].text[-3000:]
    assert same_weights(tmp_path / "run", whole_of_two)
    assert losses(tmp_path / "run") == losses(whole_of_two)


def kill_a_rank(run: subprocess.Popen[bytes], log: Path, rank: int, losses: int) -> None:
    """Kill one of torchrun's ranks once the log has the given number of losses."""
    end = time.monotonic() + 900
    while len(re.findall("  loss ", log.read_text())) < losses and time.monotonic() < end:
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"m2f_trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(ranks[rank], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("turn", range(10))
def test_torchrun_restarts_a_run_whose_rank_was_killed(
    turn: int, data: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    recipe = options(data, tmp_path / "run", per_device_train_batch_size=1)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launch, "-m", "m2f_trainer", *recipe]
    path = tmp_path / "log"
    with path.open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)
    try:
        kill_a_rank(run, path, turn % 2, 2 + turn % 3)
        assert run.wait(900) == 0, path.read_text()[-3000:]
    finally:
        run.terminate()  # and its ranks with it, where they were hung
    assert same_weights(tmp_path / "run", whole_of_two)
