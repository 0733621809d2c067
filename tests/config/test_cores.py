"""A process uses the cores that it may be scheduled on, as far as the CPU quota of its control groups goes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m2f_trainer.config.cores import cpu_quota, scheduled_cores, usable_cores

V1 = "12:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n"


def system(folder: Path, groups: str, files: dict[str, str]) -> Path:
    """A root folder with /proc/self/cgroup and files below /sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": files[name] for name in files}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(text))
    return folder


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 20000\n"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "300000 100000\n"}, 1),
        ("0::/kubepods/pod1/2f\n", {"cpu.max": "400000 100000\n"}, 4),
        (V1, {"cpu/docker/1f/cpu.cfs_quota_us": "300000\n", "cpu/docker/1f/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "20000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.2),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        (V1, {"cpu/cpu.cfs_quota_us": "damaged\n"}, math.inf),
        ("no group\n0::/a/b\udcff\n", {"cpu.max": "100000 100000\n"}, 1),
    ],
    ids=[
        "v2",
        "v2 max",
        "v2 root",
        "v2 parent",
        "v2 lowest",
        "v2 of the host",
        "v1",
        "v1 mount",
        "v1 none",
        "damaged",
        "undecodable",
    ],
)
def test_the_quota_is_the_lowest_of_the_groups_around_a_process(
    groups: str, files: dict[str, str], quota: float, tmp_path: Path
) -> None:
    assert cpu_quota(system(tmp_path, groups, files)) == quota


def test_cores_are_whole_and_at_least_one_and_at_most_those_of_the_process(tmp_path: Path) -> None:
    for text, least in (("20000", 1), ("100000", 1), ("100001", 2), ("99000000", 10**6), ("max", 10**6)):
        root = system(tmp_path, "0::/\n", {"cpu.max": f"{text} 100000\n"})
        assert usable_cores(root) == min(least, scheduled_cores())
    assert usable_cores(tmp_path / "no Linux") == scheduled_cores()
    assert usable_cores() >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which cores a process may use")
def test_a_process_that_is_bound_to_one_core_has_one() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    code += "from m2f_trainer.config.cores import usable_cores; print(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "1\n"
