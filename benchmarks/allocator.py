"""What `keep_freed_memory` saves in a training step on a CPU: CPU seconds, page faults and peak memory.

python -m benchmarks.allocator
python -m benchmarks.allocator --side 112 --batch 8 --instances 8

Light head, frozen ViT-S+, bfloat16. Each run is a process of its own, alternately without and with the function.
"""

import argparse
import resource
import time
from typing import Any

import torch

from benchmarks.measure import in_fresh_process, parser, report
from benchmarks.stock import our_model, scene
from benchmarks.train_step import forward_of, step_of
from m2f_trainer.config.arguments import HEADS
from m2f_trainer.model.lora import set_tuning
from m2f_trainer.training.allocator import keep_freed_memory

WARM_UP = 3


def main() -> None:
    """Print a row for each of the two, with the least figure of its processes: other load only adds to it."""
    made = parser(__doc__ or "")
    made.add_argument("--side", type=int, default=336)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--instances", type=int, default=28)
    made.add_argument("--queries", type=int, default=90)
    made.add_argument("--steps", type=int, default=6)
    made.add_argument("--repeats", type=int, default=6)
    arguments = made.parse_args()
    runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(arguments.repeats):
        for keep, figures in runs.items():
            figures.append(in_fresh_process(measure, arguments, keep))
    rows = [
        {"freed memory": "kept" if keep else "returned"}
        | {name: min(one[name] for one in figures) for name in figures[0]}
        for keep, figures in runs.items()
    ]
    report("Freed memory in a training step", rows, arguments)


def measure(arguments: argparse.Namespace, keep: bool) -> dict[str, Any]:
    """CPU seconds and page faults of a step, and peak MB of the process."""
    torch.set_num_threads(arguments.threads)
    if keep and not keep_freed_memory():
        raise SystemExit("keep_freed_memory has no effect here: no glibc, or MALLOC_* is set in the environment.")
    model = our_model("vits16plus", arguments.side, num_queries=arguments.queries, **HEADS["light"])
    set_tuning(model, "frozen")
    arguments.bf16, arguments.compile = True, False
    batch, _ = scene(arguments.batch, arguments.side, arguments.instances, dense=False)
    step = step_of(forward_of(model.train(), batch, arguments), model)
    for _ in range(WARM_UP):
        step()
    seconds, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(arguments.steps):
        step()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "CPU s": (time.process_time() - seconds) / arguments.steps,
        "page faults": (used.ru_minflt - faults) / arguments.steps,
        "peak MB": used.ru_maxrss / 1e3,
    }


if __name__ == "__main__":
    main()
