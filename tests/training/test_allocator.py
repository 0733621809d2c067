"""Freed tensors: whether their memory is reused."""

import os
import platform
import subprocess
import sys

import pytest

from m2f_trainer.training.allocator import keep_freed_memory

COUNT_FAULTS = """
import resource, sys
import torch
from m2f_trainer.training.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):
    torch.ones(10, 1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10, 1 << 20)  # 40 MiB, 10,240 pages of 4 KiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")


def page_faults(argument: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = [sys.executable, "-c", COUNT_FAULTS, argument]
    return int(subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout)


@glibc
def test_the_memory_of_freed_tensors_is_reused() -> None:
    assert page_faults("default") > 20 * page_faults("keep")


@glibc
def test_thresholds_of_the_environment_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert not keep_freed_memory()
