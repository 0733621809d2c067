"""Start-up time: CPU seconds of whole processes that only import or print help, compared with transformers.

python -m benchmarks.startup
"""

import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.measure import parser, report

STOCK = "from transformers import Mask2FormerForUniversalSegmentation, Trainer, TrainingArguments"
CASES = {
    "help": (["-m", "m2f_trainer", "--help"], ["-c", STOCK]),
    "the parts to train": (["-c", "from m2f_trainer import M2FTrainer, build_model, load_coco"], ["-c", STOCK]),
    "the parts to predict": (
        ["-c", "from m2f_trainer import Predictor"],
        ["-c", "from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation, pipeline"],
    ),
}
"""Case -> our command and stock's. transformers has no command for this, so our --help is compared with its imports."""


def main() -> None:
    """Measure each case and print a table."""
    made = parser(__doc__ or "")
    made.add_argument("--repeats", type=int, default=3)
    arguments = made.parse_args()
    rows = []
    for what, commands in CASES.items():
        cpu, wall = zip(*(median(command, arguments.repeats) for command in commands), strict=True)
        rows.append({"what": what, **figures(cpu, "cpu"), **figures(wall, "wall")})
    report("Startup", rows, arguments)


def figures(seconds: tuple[float, float], clock: str) -> dict[str, Any]:
    """Columns of a table: seconds of ours and of stock, and their ratio."""
    return {f"ours {clock} s": seconds[0], f"stock {clock} s": seconds[1], f"{clock} ratio": seconds[1] / seconds[0]}


def median(command: list[str], repeats: int) -> tuple[float, float]:
    """Median CPU and wall-clock seconds of a process, after a first run that fills the disk cache."""
    taken = [seconds_of(command) for _ in range(repeats + 1)][1:]
    return statistics.median(cpu for cpu, _ in taken), statistics.median(wall for _, wall in taken)


def seconds_of(command: list[str]) -> tuple[float, float]:
    """CPU and wall-clock seconds of one process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


if __name__ == "__main__":
    main()
