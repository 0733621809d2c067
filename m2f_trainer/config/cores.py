"""CPU cores that this process may use: fewer than the machine has in containers and jobs of batch systems."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores(system: Path = Path("/")) -> int:
    """Number of cores, at least 1; a share of a core that a CPU quota grants counts as one.

    `system`: the root of the file system.
    """
    return max(1, math.ceil(min(scheduled_cores(), cpu_quota(system))))


def scheduled_cores() -> int:
    """Number of cores that the process may be scheduled on, which libraries see; a quota limits their time only."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_quota(system: Path) -> float:
    """CPU seconds per second, such as 1.5, that the control groups of Linux allow this process; infinite by default.

    `docker run --cpus`, Kubernetes' limits and systemd's CPUQuota set it.
    """
    return min(_quotas(system), default=math.inf)


def _quotas(system: Path) -> Iterator[float]:
    """The limits of the process's group and of those around it, of both versions of control groups."""
    mounts = system / "sys/fs/cgroup"
    try:
        groups = os.fsdecode((system / "proc/self/cgroup").read_bytes()).splitlines()
    except OSError:  # another system than Linux
        return
    for controllers, path in (line.split(":", 2)[1:] for line in groups if line.count(":") > 1):
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path)
        for around in (group, *group.parents):  # in a container, the path may be that of the host, beyond the mount
            folder = mounts / ("cpu" if controllers else "") / str(around).lstrip("/")
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            with contextlib.suppress(OSError, ValueError):  # no such group here; "max" is no limit
                quota, period = map(int, " ".join((folder / name).read_text("utf-8") for name in names).split())
                if quota > 0 and period > 0:
                    yield quota / period
