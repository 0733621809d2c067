"""Produce one result: environment, number of steps, training, prediction, score. Finished parts are reused."""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rivals.environments import prepare, versions
from benchmarks.rivals.measuring import measured
from benchmarks.rivals.score import score
from benchmarks.rivals.table import Rival
from benchmarks.rivals.task import PREDICTIONS, TRAINED, Task, annotation_file

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 0.98
"""Share of the budget that is planned; the rest is for steps that take longer than measured."""


@dataclass(frozen=True)
class Benchmark:
    """Paths that all results share. `out` gets `results/` and `runs/`; `environments` one folder for each rival."""

    dataset: Path
    backbone: Path
    out: Path
    environments: Path

    def result(self, rival: Rival, minutes: float, seed: int) -> dict[str, Any]:
        """The result of one rival, budget and seed: read from `results/`, or produced if absent."""
        name = f"{rival.name}-{minutes:g}-{seed}-{rival.key(self.dataset.name)}"
        path = self.out / "results" / f"{name}.json"
        if not path.exists():
            print(f"{time.strftime('%H:%M')} {name}", flush=True)
            _write(
                path, self._run(rival, Task(**self._fields(name), minutes=minutes, seed=seed, settings=rival.settings))
            )
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**made, "label": rival.label}

    def _fields(self, name: str) -> dict[str, str]:
        folder = self.out / "runs" / name
        return {"dataset": str(self.dataset), "backbone": str(self.backbone), "folder": str(folder)}

    def _run(self, rival: Rival, task: Task) -> dict[str, Any]:
        python = prepare(rival.packages, self.environments / rival.name)
        task = replace(task, steps=self._steps(rival, task.minutes, python))
        folder, file = Path(task.folder), task.save()
        train = _phase(python, rival, "train", file)
        predict = _phase(python, rival, "predict", file)
        results = json.loads((folder / PREDICTIONS).read_text(encoding="utf-8"))
        annotations = annotation_file(self.dataset, "valid")
        return {
            "rival": rival.name,
            "label": rival.label,
            "minutes": task.minutes,
            "seed": task.seed,
            "cpu_minutes": train["cpu"] / 60,
            "figures": score(annotations, results),
            "trained": json.loads((folder / TRAINED).read_text(encoding="utf-8")),
            "predicting_cpu_seconds_an_image": predict["cpu"] / len(task.annotations("valid")["images"]),
            "dataset": self.dataset.name,
            "settings": rival.settings,
            "commands": [train["command"], predict["command"]],
            "versions": versions(python, rival.packages),
            "machine": {"processor": processor(), "system": platform.platform(), "threads": 1},
            "load": {"train": train["load"], "predict": predict["load"]},
            "date": train["date"],
        }

    def _steps(self, rival: Rival, minutes: float, python: Path) -> int | None:
        """The number of steps that fit into the budget, from two short trainings that are run once for all budgets."""
        if rival.probe_steps is None:
            return None
        name = f"{rival.name}-rate-{rival.key(self.dataset.name)}"
        path = self.out / "results" / f"{name}.json"
        if not path.exists():
            print(f"{time.strftime('%H:%M')} {name}", flush=True)
            seconds = []
            for steps in rival.probe_steps:
                fields = self._fields(f"{name}-{steps}")
                task = Task(**fields, minutes=minutes, seed=0, settings=rival.settings, steps=steps)
                seconds.append(_phase(python, rival, "train", task.save())["cpu"])
            _write(path, rate(rival.probe_steps, (seconds[0], seconds[1])))
        return planned(json.loads(path.read_text(encoding="utf-8")), minutes)


def rate(steps: tuple[int, int], seconds: tuple[float, float]) -> dict[str, Any]:
    """Seconds of the set-up and of one step, from the steps and the seconds of two trainings."""
    each = (seconds[1] - seconds[0]) / (steps[1] - steps[0])
    return {"probes": list(zip(steps, seconds, strict=True)), "setup": seconds[0] - each * steps[0], "step": each}


def planned(rate: dict[str, Any], minutes: float) -> int:
    """The number of steps that fit into the minutes.

    Raises:
        SystemExit: not one step fits
    """
    steps = int((MARGIN * 60 * minutes - rate["setup"]) / rate["step"])
    if steps < 1:
        raise SystemExit(
            f"--minutes {minutes:g}: set-up takes {rate['setup']:.0f} s and a step {rate['step']:.1f} s of CPU time. "
            "Give more minutes."
        )
    return steps


def _phase(python: Path, rival: Rival, phase: str, task_file: Path) -> dict[str, Any]:
    """Run a phase of the adapter unless it is finished; return its cost, command, load and date."""
    path = task_file.with_name(f"{phase}.spent.json")
    if not path.exists():
        command = [str(python), "-m", rival.module, phase, str(task_file)]
        spent = measured(command, task_file.with_name(f"{phase}.log"), ROOT)
        load = round(os.getloadavg()[2], 2)  # of the last 15 minutes
        _write(path, {**asdict(spent), "command": " ".join(command), "load": load, "date": time.strftime("%Y-%m-%d")})
    finished: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return finished


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def processor() -> str:
    """The number of logical cores and the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
