"""The CPU time of a command: user and system seconds of its whole process tree."""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")
ENVIRONMENT = {
    **{f"{library}_NUM_THREADS": "1" for library in LIBRARIES},
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Spent:
    """Seconds of a finished command."""

    cpu: float
    wall: float


def measured(command: Sequence[str], log: Path, folder: Path) -> Spent:
    """Run a command in `folder` with one thread and no GPU, its output in `log`; return its CPU and wall-clock time.

    The kernel's sum is used: CPU time of the process and of all its descendants whose parents waited for them.

    Raises:
        RuntimeError: the command failed; the message has the log's last lines
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    environment = {**os.environ, **ENVIRONMENT}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)}\nfailed with {process.returncode}; the end of {log}:\n{last}")
    return Spent(usage.ru_utime + usage.ru_stime, time.monotonic() - began)
