"""Ranks: start and leave the process group, gather tensors, decide on the main rank.

torchrun can restart the ranks after one has died (`--max-restarts`), but its agent keeps one key-value store over all
restarts (pytorch issue 135712, still so in torch 2.13), and the ranks exchange their addresses in it. A restarted rank
may read the address of a dead process and wait for it until the timeout; most restarts hung or failed, with any code.
`start_group` gives each start a key prefix of its own in that store.
"""

import atexit
import gc
import logging
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group starts: its functions' defaults would keep the group for ever
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""Time that ranks wait for what the main rank alone does."""

_patient: list[Any] = []
"""The process group that it was started for, and the group of `_patient_group`."""

LEADER = "m2f/leader"
"""The key of the prefix that rank 0 has proposed last."""


def start_group(backend: str | None, timeout: timedelta) -> None:
    """Start the process group of a launcher, where accelerate would not start it as it should.

    If torchrun may restart the ranks, the group gets keys that no earlier start has used. On CPUs, accelerate would not
    pass the timeout on. Otherwise this does nothing, and accelerate starts the group.

    Args:
        backend: as for `torch.distributed.init_process_group`; None chooses by device, gloo is for CPUs.
        timeout: of this call, and of the group's collectives.
    """
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    if (
        int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        keys = PrefixStore(agree_on_prefix(store, rank, world, timeout), store)
        dist.init_process_group(backend, store=keys, rank=rank, world_size=world, timeout=timeout)
    elif backend == "gloo":
        dist.init_process_group(backend, timeout=timeout)


def agree_on_prefix(store: TCPStore, rank: int, world: int, timeout: timedelta) -> str:
    """A prefix that the ranks of this start share and those of earlier starts did not have.

    Rank 0 proposes a random prefix; every other rank answers under it with a random token; rank 0 publishes the tokens
    it has received. A rank that doesn't find its token among them has answered a proposal of an earlier start, and
    waits for a newer one.

    Raises:
        TimeoutError: rank 0 has not published this rank's token in time.
    """
    token, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set(LEADER, token)
        received = [store.get(f"{token}/{other}").decode() for other in range(1, world)]  # waits for each
        store.set(f"{token}/received", ",".join(received))
        return token
    while time.monotonic() < end:
        prefix: str = store.get(LEADER).decode()
        store.set(f"{prefix}/{rank}", token)
        while store.get(LEADER).decode() == prefix and time.monotonic() < end:
            published = f"{prefix}/received"
            if store.check([published]) and token in store.get(published).decode().split(","):
                return prefix
            time.sleep(0.05)
    raise TimeoutError(f"rank {rank} has not heard from rank 0 within {timeout.total_seconds():.0f} s of starting")


def leave() -> None:
    """End the process group, if there is one.

    A process that exits with its group open may abort: gloo's threads go on while Python is finalised (SIGABRT,
    "terminate called without an active exception"). torchrun takes that for a failure and restarts a finished run.
    Those threads are joined when the last reference to the group is dropped. Models wrapped for it hold references,
    possibly in reference cycles. The last reference must be one of Python's: it is dropped without the interpreter's
    lock, which a thread may need to end. Where a wrapped model drops it, the lock is held, and both wait for ever.
    """
    if dist.is_available() and dist.is_initialized():
        last = dist.group.WORLD
        _patient.clear()
        dist.destroy_process_group()
        gc.collect()
        del last


def leave_at_exit() -> None:
    """Make this process leave its process group at exit, normal or after an exception.

    Only with gloo, which does not wait for other ranks. NCCL may wait; there torch aborts an open group at exit.
    """
    atexit.unregister(_leave_gloo)
    atexit.register(_leave_gloo)


def _leave_gloo() -> None:
    if dist.is_initialized() and dist.get_backend() == "gloo":
        leave()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks if it is sharded. Collective: all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _patient_group() -> Any:
    """The ranks over gloo, with the time limit `PATIENCE`; started once for each process group."""
    if not _patient or _patient[0] is not dist.group.WORLD:
        _patient[:] = [dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE)]
    return _patient[1]


def from_main(decide: Callable[[], T]) -> T:
    """Call `decide` on the main rank only and return its result on every rank. Collective: all ranks must call it.

    `decide` may take longer than the time limit of the group's collectives, such as the score of a large split: the
    other ranks wait in a group of their own, over gloo, for up to `PATIENCE`. A launcher ends them if the main rank
    dies.
    """
    if not dist.is_initialized():
        return decide()
    group = _patient_group()
    result: list[Any] = [decide() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result, src=0, group=group, device=torch.device("cpu"))
    decided: T = result[0]
    return decided


def from_every_rank(values: list[T]) -> list[T]:
    """The lists of all ranks, concatenated, on every rank. Collective: all ranks must call it."""
    if not dist.is_initialized():
        return values
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def warn_on_main(logger: logging.Logger, message: str, *values: object) -> None:
    """Log a warning on the main rank only: one that every rank would log."""
    if rank_and_world_size()[0] == 0:
        logger.warning(message, *values)


def any_rank(flag: bool | torch.Tensor, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective: all ranks must call it."""
    if not dist.is_initialized():
        return bool(flag)
    vote = (
        flag.to(device, torch.float32) if isinstance(flag, torch.Tensor) else torch.full((), float(flag), device=device)
    )
    dist.all_reduce(vote, dist.ReduceOp.MAX)
    return bool(vote)
