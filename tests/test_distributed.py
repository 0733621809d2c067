"""Ranks that start again agree among themselves, whatever ranks before them left behind."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from m2f_trainer.distributed import agree

LIMIT = timedelta(seconds=5)


def life(store: dist.Store, world: int, order: list[int]) -> set[str]:
    """The names that the ranks come to when they start in this order."""
    with ThreadPoolExecutor(world) as pool:
        names = {rank: pool.submit(agree, store.clone(), rank, world, LIMIT) for rank in order}
        return {name.result() for name in names.values()}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_each_life_of_the_ranks_has_a_name_of_its_own_in_one_store(order: list[int]) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=LIMIT, wait_for_workers=False)
    names = [life(store, 3, order) for _ in range(4)]
    assert [len(name) for name in names] == [1, 1, 1, 1]
    assert len(set.union(*names)) == 4


def test_a_rank_alone_says_whom_it_waited_for() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=LIMIT, wait_for_workers=False)
    life(store, 2, [0, 1])
    with pytest.raises(TimeoutError, match="rank 1 heard nothing of rank 0 within 1 s of starting"):
        agree(store, 1, 2, timedelta(seconds=1))
