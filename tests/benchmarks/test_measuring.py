import sys
from pathlib import Path

import pytest

from benchmarks.rivals.measuring import measured

BURN = "import time\nwhile time.process_time() < 0.3: pass\n"


def test_cpu_time_of_a_grandchild_counts_too(tmp_path: Path) -> None:
    program = f"import subprocess, sys\n{BURN}subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n"
    spent = measured([sys.executable, "-c", program, BURN], tmp_path / "log", tmp_path)
    assert spent.cpu >= 0.6


def test_a_command_gets_one_thread_and_no_gpu(tmp_path: Path) -> None:
    program = "import os; print(os.environ['OMP_NUM_THREADS'], repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    measured([sys.executable, "-c", program], tmp_path / "log", tmp_path)
    assert (tmp_path / "log").read_text() == "1 ''\n"


def test_a_failed_command_is_quoted_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"failed with 3; the end of .*log:\n(.*\n)*no disk"):
        measured([sys.executable, "-c", "print('no disk'); raise SystemExit(3)"], tmp_path / "log", tmp_path)
