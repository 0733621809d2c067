"""How the cost of a training step grows with instances, image size and ranks, and that of scoring with the dataset.

python -m benchmarks.scale
torchrun --nproc_per_node 2 -m benchmarks.scale --ranks

`growth` is the exponent of the cost between a row and the one before: 1 is proportional, 0 is constant. With --ranks
each process has its own batch; ideally a step takes as long as on one rank.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import scoring, train_step
from benchmarks.measure import alternate, compared, parser, report
from benchmarks.stock import BACKBONES, our_model, scene, stock_model


def main() -> None:
    """Measure sizes or ranks and print a table."""
    made = parser(__doc__ or "")
    made.add_argument("--backbone", default="tiny", choices=list(BACKBONES))
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--side", type=int, nargs="+", default=[128, 256, 512])
    made.add_argument("--instances", type=int, nargs="+", default=[5, 20, 60, 200])
    made.add_argument("--images", type=int, nargs="+", default=[250, 1000, 4000])
    made.add_argument("--ranks", action="store_true", help="under torchrun: the cost of a step on all ranks")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.ranks:
        ranks(arguments)
    else:
        sizes(arguments)


def sizes(arguments: argparse.Namespace) -> None:
    """Training steps and scoring of growing size, on one rank."""
    step = argparse.Namespace(**vars(arguments), bf16=False, compile=False)
    rows = [
        *series("instances", arguments.instances, lambda n: train_step.measure(step, "full", arguments.side[0], n)),
        *series("side", arguments.side, lambda side: train_step.measure(step, "full", side, 20)),
        *series("images scored", arguments.images, lambda n: scoring.measure(n, scoring.OBJECTS, 100, None)),
    ]
    report("Cost against size", rows, arguments)


def series(what: str, sizes: Sequence[int], measure: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each size, with the growth of the cost from the row before."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        measured = measure(size)
        seconds = {name: next(measured[key] for key in measured if key.startswith(name)) for name in ("ours", "stock")}
        row = {"what": what, "size": size, **{f"{name} s": value for name, value in seconds.items()}}
        row["ratio"] = seconds["stock"] / seconds["ours"]
        for name, value in seconds.items():
            row[f"{name} growth"] = (
                math.log(value / rows[-1][f"{name} s"]) / math.log(size / rows[-1]["size"]) if rows else None
            )
        rows.append(row)
    return rows


def ranks(arguments: argparse.Namespace) -> None:
    """Time a data-parallel step on every rank; rank 0 prints its own time, which includes waiting for the others."""
    cuda = arguments.device != "cpu"
    dist.init_process_group("nccl" if cuda else "gloo")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    ours = our_model(arguments.backbone, arguments.side[0])
    models: dict[str, nn.Module] = {"stock": stock_model(ours), "ours": ours}
    batches = dict(zip(("ours", "stock"), scene(arguments.batch, arguments.side[0], 20, device), strict=True))
    options = argparse.Namespace(**{**vars(arguments), "device": device.split(":")[0], "bf16": False, "compile": False})
    runs = {
        name: train_step.step_of(train_step.forward_of(parallel(model, device), batches[name], options), model)
        for name, model in models.items()
    }
    seconds = alternate(runs, arguments.repeats, arguments.device)
    if dist.get_rank() == 0:
        report("A data-parallel step", [{"ranks": dist.get_world_size(), **compared(seconds, "wall")}], arguments)
    dist.destroy_process_group()


def parallel(model: nn.Module, device: str) -> nn.Module:
    """The model on its device, in DistributedDataParallel."""
    model.to(device).train()
    return DistributedDataParallel(model, find_unused_parameters=True)


if __name__ == "__main__":
    main()
