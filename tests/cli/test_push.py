"""`m2f push`: options, dry run and next step."""

from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in


def target(repo_id: str, **options: object) -> object:
    return repo_id, options


def test_the_options_are_passed_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def push(*values: object) -> str:
        seen.append(values)
        return "https://hub/me/m"

    stand_in(monkeypatch, "m2f_trainer.hub.upload", push=push, Target=target)
    assert main(["push", "m", "me/m", "--private", "--revision", "draft"]) == 0
    options = {"private": True, "revision": "draft", "pull_request": False, "adapter_only": False, "pictures": False}
    assert seen == [(Path("m"), ("me/m", options))]
    assert capsys.readouterr().out == "Uploaded to https://hub/me/m.\n\nNext:\n  m2f predict me/m IMAGES\n"


def test_a_dry_run_lists_the_files_with_their_sizes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [("model.safetensors", 12345), ("README.md", None)]
    stand_in(monkeypatch, "m2f_trainer.hub.upload", planned_files=lambda *_: files, Target=target)
    assert main(["push", "m", "me/m", "--dry_run"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in lines] == ["model.safetensors", "README.md"]
    assert [line[-2].strip() for line in lines] == ["12,345", "to be written"]
