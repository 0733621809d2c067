"""What the benchmarks measure with: alternating timings, kept activations, memory, and the machine's description."""

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

Run = Callable[[], object]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=1)
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


def peak_mb(run: Run, device: str = "cpu") -> float:
    """Most MB that a run adds to what is held before it: the allocator's on CUDA, else the process's resident memory.

    What earlier runs freed and the C library kept can be reused unseen: measure in a process of its own
    (`in_a_process`) where the figure matters.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what is free, or a run could reuse it unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_kb("VmRSS")
    kept = run()
    peak = _status_kb("VmHWM")
    del kept
    return (peak - before) / 1e3


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def waits(run: Run, device: str) -> int | None:
    """How often a run makes the host wait for a CUDA device; None on a CPU, where there is nothing to wait for."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in told)


def in_a_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """What the task returns, run in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def compared(seconds: Mapping[str, Mapping[str, float]], device: str) -> dict[str, float]:
    """The columns of a comparison: ours, stock, and how many times as fast ours is; CPU time on a CPU, else wall."""
    clock = "cpu" if device == "cpu" else "wall"
    ours, stock = seconds["ours"][clock], seconds["stock"][clock]
    return {f"ours {clock} s": ours, f"stock {clock} s": stock, "ratio": stock / ours}


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
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
