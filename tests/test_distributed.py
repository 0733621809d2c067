"""Ranks: restarts in one store, and when the process group starts."""

import atexit
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from m2f_trainer.distributed import agree_on_prefix, from_main, leave, leave_at_exit
from tests.ranks import run_two_ranks

LIMIT = timedelta(seconds=5)


def start_ranks(store: dist.Store, world: int, order: list[int]) -> set[str]:
    """The prefixes that the ranks agree on when they start in this order."""
    with ThreadPoolExecutor(world) as pool:
        names = {rank: pool.submit(agree_on_prefix, store.clone(), rank, world, LIMIT) for rank in order}
        return {name.result() for name in names.values()}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_each_start_of_the_ranks_gets_a_prefix_of_its_own_in_one_store(order: list[int]) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=LIMIT, wait_for_workers=False)
    names = [start_ranks(store, 3, order) for _ in range(4)]
    assert [len(name) for name in names] == [1, 1, 1, 1]
    assert len(set.union(*names)) == 4


def test_a_rank_alone_names_the_rank_it_waited_for() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=LIMIT, wait_for_workers=False)
    start_ranks(store, 2, [0, 1])
    with pytest.raises(TimeoutError, match="rank 1 has not heard from rank 0 within 1 s of starting"):
        agree_on_prefix(store, 1, 2, timedelta(seconds=1))


def start_and_exit(rank: int, folder: Path, failing: int | None) -> None:
    """A rank of a gloo group that trains a step in a wrapped model and exits without leaving the group itself."""
    sys.stderr = (folder / f"{rank}.log").open("w", buffering=1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    leave_at_exit()
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    if rank == failing:
        raise RuntimeError("this rank failed")
    if failing is not None:
        dist.all_reduce(torch.ones(1))


def exit_through_atexit(*arguments: Any) -> None:
    """multiprocessing ends its children without Python's exit; here the exit functions run as in any process."""
    try:
        start_and_exit(*arguments)
    finally:
        atexit._run_exitfuncs()
        left = not dist.is_initialized()
        (arguments[1] / f"{arguments[0]}.left").write_text(str(left))


@pytest.mark.parametrize("failing", [None, 0])
def test_every_rank_leaves_its_group_at_exit_also_when_one_fails(failing: int | None, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=exit_through_atexit, args=(rank, tmp_path, failing)) for rank in range(2)]
    for process in ranks:
        process.start()
    end = time.monotonic() + 120
    for process in ranks:
        process.join(end - time.monotonic())
    assert [process.exitcode for process in ranks] == ([0, 0] if failing is None else [1, 1])
    assert [(tmp_path / f"{rank}.left").read_text() for rank in range(2)] == ["True", "True"]


def leave_early(rank: int, folder: Path) -> None:
    """Rank 0 leaves while a thread of its group still works, for a tensor of Python, and its model is in a cycle."""
    sys.stderr = (folder / f"{rank}.log").open("w", buffering=1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    model: Any = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model.itself = model
    del model
    tensor: Any = torch.ones(1)
    tensor.of_python = True
    if rank == 1:
        time.sleep(1)
    work = dist.all_reduce(tensor, async_op=True)
    if rank == 1:
        work.wait()
    del tensor, work
    leave()
    (folder / f"{rank}.txt").write_text(str(sum(name.startswith(("gloo", "pt_gloo")) for name in thread_names())))


def thread_names() -> list[str]:
    return [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the names of threads from Linux's /proc")
def test_leaving_the_group_ends_its_threads_and_does_not_hang(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=leave_early, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    end = time.monotonic() + 120
    for process in ranks:
        process.join(max(end - time.monotonic(), 0))
        process.kill()
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["0", "0"]


def decide_slowly(rank: int, folder: Path) -> None:
    """Rank 0 takes longer than the time limit of the group's collectives."""
    sys.stderr = (folder / f"{rank}.log").open("w", buffering=1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=1))

    def decide() -> int:
        time.sleep(3)
        return 7

    decided = [from_main(decide), from_main(lambda: 8)]
    leave()
    (folder / f"{rank}.txt").write_text(str(decided))


def test_ranks_wait_for_the_main_one_beyond_the_limit_of_collectives(tmp_path: Path) -> None:
    run_two_ranks(decide_slowly, tmp_path, 60)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["[7, 8]"] * 2
