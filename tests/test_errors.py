"""Errors for users: optional packages are named with the extra that installs them."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from m2f_trainer.errors import M2FError, MissingPackageError, RunStopped, mistyped_path, needs

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
FILES = sorted((ROOT / "m2f_trainer").rglob("*.py"))


def calls_of_needs() -> Iterator[tuple[list[str], str]]:
    """Packages and extra of every call of `needs` in the package."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "needs":
                (extra,) = [keyword.value for keyword in node.keywords if keyword.arg == "extra"]
                yield [ast.literal_eval(argument) for argument in node.args], ast.literal_eval(extra)


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    needs("json", extra="export")
    expected = r"this needs no_such_a and no_such_b, which are not installed: pip install 'm2f-trainer\[export\]'"
    with pytest.raises(MissingPackageError, match=expected):
        needs("json", "no_such_a", "no_such_b", extra="export")


def test_every_extra_that_is_asked_for_exists_and_installs_the_packages() -> None:
    calls = list(calls_of_needs())
    assert calls
    for packages, extra in calls:
        installed = {re.split(r"[\[<>=]", requirement)[0].replace("-", "_") for requirement in EXTRAS[extra]}
        assert set(packages) <= installed, extra


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_install_command_names_an_extra_that_exists(path: Path) -> None:
    commands = re.findall(r"pip install ('?)m2f-trainer(?:\[(\w+)\])?('?)", path.read_text(encoding="utf-8"))
    for opening, extra, closing in commands:
        assert not extra or (extra in EXTRAS and opening == closing == "'"), "a shell expands brackets without quotes"


def test_a_stopped_run_is_not_handled_as_a_failure() -> None:
    assert not issubclass(RunStopped, Exception)
    assert not issubclass(RunStopped, M2FError)
    assert RunStopped.status == 75


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/frist", "runs/frist: there is no such file or folder; the nearest name is runs/first."),
        ("rnus/first", "rnus/first: there is no such file or folder; the nearest name is runs/first."),
        ("runs/other", "runs/other: there is no such file or folder."),
        ("my_coc", "my_coc: there is no such file or folder; the nearest name is my_coco."),
        ("./user/name", "./user/name: there is no such file or folder."),
        ("user/name", ""),
        ("runs/first", ""),
        ("a\0b", "a\0b: there is no such file or folder."),
        ("x" * 5000, f"{'x' * 5000}: there is no such file or folder."),
    ],
)
def test_a_mistyped_path_is_named_with_the_nearest_one(name, message, tmp_path, monkeypatch):
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "my_coco").mkdir()
    monkeypatch.chdir(tmp_path)
    assert mistyped_path(name) == message


@pytest.mark.parametrize(
    "command",
    [
        "check runs/frist",
        "predict runs/frist a.png",
        "evaluate runs/frist set",
        "export runs/frist",
        "report runs/frist",
        "push runs/frist me/model",
        "train quickstart --dataset_name set --init_from runs/frist",
    ],
)
def test_a_mistyped_path_is_an_error_at_once_without_the_hub(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) != 0
    assert "no such file or folder; the nearest name is runs/first" in "".join(capsys.readouterr())
