"""The version: one, for the build, the package and anything that imports it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import m2f_trainer
from m2f_trainer.version import __version__

ROOT = Path(__file__).parents[1]


def test_the_package_has_the_version_that_is_built() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', source, flags=re.MULTILINE) == [__version__]
    assert m2f_trainer.__version__ == __version__


def test_the_version_is_read_without_importing_torch() -> None:
    code = "import sys, m2f_trainer; print(m2f_trainer.__version__, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [__version__, "False"]
