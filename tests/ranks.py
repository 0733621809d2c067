"""Runs a function in two processes."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path


def run_two_ranks(function: Callable[[int, Path], None], folder: Path, limit: float) -> None:
    """Call function(rank, folder) in two new processes, and assert that both end without error in `limit` seconds."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=function, args=(rank, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(limit)
    assert [process.exitcode for process in ranks] == [0, 0]
