"""The Triton kernels against transformers' deformable attention."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton comes with torch for CUDA")
def test_the_triton_kernels_and_their_gradients_are_transformers() -> None:
    """By Triton's interpreter, which has to be asked for before anything imports triton: in a process of its own."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", "tests.model.triton_interpreted"], cwd=root, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is there")
def test_the_triton_switch_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match="M2F_TRITON=1 needs the package triton"):
        import m2f_trainer.model.deformable_triton  # noqa: F401
