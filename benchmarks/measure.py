"""Shared by the benchmarks: alternating timings, peak memory, device synchronisations, machine description."""

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
    """A parser with the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    return made


def alternate(runs: Mapping[str, Run], repeats: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Median seconds of each run. The runs alternate, after one warm-up each, so that other load affects all alike.

    `cpu` is the CPU time of this process, which other processes hardly change; `wall` is wall-clock time.
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
    """Peak MB that a run adds: of CUDA's allocator, or of the process's resident memory on a CPU.

    Memory that earlier runs freed and the C library kept is reused without being counted: call this in a fresh process
    (`in_fresh_process`).
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: return free memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status_kb("VmRSS")
    kept = run()
    peak = _status_kb("VmHWM")
    del kept
    return (peak - before) / 1e3


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def synchronisations(run: Run, device: str) -> int | None:
    """How often a run makes the host wait for a CUDA device; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


def in_fresh_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """Run the task in a new process; return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def compared(seconds: Mapping[str, Mapping[str, float]], device: str) -> dict[str, float]:
    """Columns of a table: seconds of ours and of stock, and their ratio. CPU time on a CPU, else wall-clock time."""
    clock = "cpu" if device == "cpu" else "wall"
    ours, stock = seconds["ours"][clock], seconds["stock"][clock]
    return {f"ours {clock} s": ours, f"stock {clock} s": stock, "ratio": stock / ours}


def machine(device: str = "cpu") -> dict[str, Any]:
    """Device, threads, versions and date, to print beside the figures."""
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
    """Print rows as a Markdown table with the machine's description; with --output also write them as JSON."""
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
