"""Ranks that torchrun starts again meet afresh.

torchrun's agent keeps one key-value store for all lives of a run (pytorch issue 135712, and so still in torch 2.13), in
which the ranks leave each other their addresses. A rank that comes back first reads the address of a process that is
gone, and waits for it until the time limit: `--max-restarts` hung or failed in most of our tries, without any code of
ours. Here the ranks of one life agree on a prefix of their own for all they say in that store.
"""

import atexit
import gc
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor

LEADER = "m2f/leader"


def meet_afresh(backend: str | None, timeout: timedelta) -> None:
    """Start torch's process group on keys of this life alone, where torchrun may start the ranks again.

    `backend`: as for `init_process_group`; None chooses by device. Elsewhere nothing happens, and accelerate starts it.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts < 1 or not shared or dist.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    life = agree(store, rank, world, timeout)
    dist.init_process_group(backend, store=PrefixStore(life, store), rank=rank, world_size=world, timeout=timeout)


def agree(store: TCPStore, rank: int, world: int, timeout: timedelta) -> str:
    """A name that all ranks of this life share and no rank of a former one had. Raises TimeoutError.

    The first rank proposes; the others answer with a word of their own; the first reads the words back. Who does not
    find his own among them answered a proposal of a former life, and looks for a newer one.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set(LEADER, word)
        answers = [f"{word}/{other}" for other in range(1, world)]
        heard = [store.get(answer).decode() for answer in answers]  # each waits until it is there
        store.set(f"{word}/heard", ",".join(heard))
        return word
    while time.monotonic() < end:
        life: str = store.get(LEADER).decode()
        store.set(f"{life}/{rank}", word)
        while store.get(LEADER).decode() == life and time.monotonic() < end:
            if store.check([f"{life}/heard"]) and word in store.get(f"{life}/heard").decode().split(","):
                return life
            time.sleep(0.05)
    raise TimeoutError(f"rank {rank} heard nothing of rank 0 within {timeout.total_seconds():.0f} s of starting")


def leave() -> None:
    """End the process group, if there is one.

    A process that exits with its group open may abort: gloo's threads go on while Python is finalised (SIGABRT,
    "terminate called without an active exception"). torchrun takes that for a failure and restarts a finished run.
    Those threads are joined when the last reference to the group is dropped; models wrapped for it, which may stand in
    reference cycles, hold some.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def leave_at_exit() -> None:
    """Have this process leave its process group when it exits, normally or after an exception, whoever started it.

    Leaving does not wait for other ranks with gloo. With NCCL it may, and so it is left to torch there, which aborts
    such a group at exit.
    """
    atexit.unregister(_leave_gloo)
    atexit.register(_leave_gloo)


def _leave_gloo() -> None:
    if dist.is_initialized() and dist.get_backend() == "gloo":
        leave()


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks where it is sharded; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_main(decide: Callable[[], Any]) -> Any:
    """Call `decide` on the main rank only and return its result on every rank. All ranks must call this."""
    if not dist.is_initialized():
        return decide()
    result = [decide() if dist.get_rank() == 0 else None]
    broadcast_object_list(result)
    return result[0]


def from_every_rank(values: list[Any]) -> list[Any]:
    """The lists of all ranks as one, on every rank. All ranks must call this."""
    if not dist.is_initialized():
        return values
    gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_rank(flag: bool | torch.Tensor, device: torch.device) -> bool:
    """Whether the flag is set on any rank; all ranks must ask at the same point."""
    if not dist.is_initialized():
        return bool(flag)
    vote = (
        flag.to(device, torch.float32) if isinstance(flag, torch.Tensor) else torch.full((), float(flag), device=device)
    )
    dist.all_reduce(vote, dist.ReduceOp.MAX)
    return bool(vote)
