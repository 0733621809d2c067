"""What the benchmarks measure with: alternating timings, kept activations, memory, and the machine's description."""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Run = Callable[[], object]


def parser(description: str) -> argparse.ArgumentParser:
    """The two options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--output", type=Path, help="a JSON file for the figures")
    return made


def alternate(runs: Mapping[str, Run], repeats: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Median seconds of each run, taken in turns after one warm-up each, so that a loaded machine hits all alike.

    `cpu` is the process's own CPU time, which other processes hardly change; `wall` is the clock's.
    """
    for run in runs.values():
        run()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            _wait(device)
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            _wait(device)
            taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {"cpu": statistics.median(cpu for cpu, _ in pairs), "wall": statistics.median(wall for _, wall in pairs)}
        for name, pairs in taken.items()
    }


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps between a forward pass and its backward, the parameters aside."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    total = sum(kept.values())
    loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return total


def peak_rss() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were taken on."""
    card = torch.cuda.get_device_name() if device != "cpu" else _processor()
    return {
        "device": card,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def report(title: str, rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> None:
    """Print rows as a Markdown table, and write them with the machine's description where --output asks for it."""
    device = machine(arguments.device)
    print(f"\n{title}\n\n{', '.join(f'{name} {value}' for name, value in device.items())}\n")
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(_text(row[column]) for column in columns) + " |")
    if arguments.output:
        arguments.output.write_text(json.dumps({"title": title, "machine": device, "rows": list(rows)}, indent=1))


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
