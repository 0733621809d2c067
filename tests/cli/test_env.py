"""`m2f env`: what a bug report needs, and nothing secret."""

import re
import tomllib
from pathlib import Path

import pytest

from m2f_trainer.cli import env
from m2f_trainer.cli.main import main
from m2f_trainer.version import __version__

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEVELOPMENT = {
    "m2f-trainer",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "mypy",
    "scipy-stubs",
    "faster-coco-eval",
}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=,;]", requirement)[0] for requirement in requirements}


def test_the_packages_listed_are_those_of_pyproject() -> None:
    extras = set.union(*(names(group) for group in PROJECT["optional-dependencies"].values()))
    assert set(env.REQUIRED) == names(PROJECT["dependencies"])
    assert set(env.OPTIONAL) == extras - DEVELOPMENT | {"triton"}, "triton comes with torch for CUDA"


def test_versions_devices_packages_and_caches_are_printed_without_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    values = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert values["m2f_trainer"] == __version__
    assert values["torch"] == torch.__version__
    assert values["cpu"].endswith(f"{torch.get_num_threads()} threads")
    assert set(env.OPTIONAL) <= set(values)
    assert "models" in values
    assert "canary" not in out


def test_a_package_that_is_not_installed_has_a_dash() -> None:
    assert env.installed_version("no-such-package-of-ours") == "-"
