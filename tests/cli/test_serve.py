"""`m2f serve`: options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m2f_trainer import errors
from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra was installed."""
    monkeypatch.setattr(errors, "needs", lambda *_, **__: None)


def test_the_options_are_passed_on(
    capsys: pytest.CaptureFixture[str], installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def serve(*values: Any, ready: Any, **named: Any) -> None:
        ready("http://[::1]:80/")
        seen.append((values, named))

    stand_in(monkeypatch, "m2f_trainer.serve.app", ServeOptions=dict)
    stand_in(monkeypatch, "m2f_trainer.serve.server", serve=serve)
    stand_in(monkeypatch, "m2f_trainer.serve.label_studio", ImageReader=lambda *values: values)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "secret")
    model = str(tmp_path / "first")
    (tmp_path / "first").mkdir()
    arguments = ["--host", "::1", "--port", "80", "--threshold", "0.4", "--batch_size", "8", "--max_wait", "0.1"]
    arguments += ["--max_open", "9", "--max_bytes", "1000", "--label_studio_url", "http://ls:8080"]
    assert main(["serve", model, *arguments, "--precision", "float32", "--pixel_range", "0,4095"]) == 0
    options = {"name": "first", "threshold": 0.4, "batch_size": 8, "max_wait": 0.1, "max_open": 9, "max_bytes": 1000}
    options["reader"] = ("http://ls:8080", "secret", 1000)
    assert seen == [((model, "::1", 80, options), {"pixel_range": "0,4095", "precision": "float32"})]
    out = capsys.readouterr().out
    assert out == "first answers at http://[::1]:80/ (Ctrl-C stops it)\nStopped: all requests are answered.\n"


def test_a_missing_package_is_named_with_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert main(["serve", "some/model"]) == 1
    assert "this needs uvicorn, which is not installed: pip install 'm2f-trainer[serve]'" in capsys.readouterr().err


def test_a_mistyped_model_is_an_error(capsys: pytest.CaptureFixture[str], installed: None, tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path / "nothing")]) == 1
    assert "there is no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--port", "65536", "expected a whole number from 0 to 65535, got '65536'"),
        ("--max_wait", "inf", "expected 0 to 60 seconds, got 'inf'"),
        ("--max_wait", "nan", "expected 0 to 60 seconds, got 'nan'"),
        ("--max_open", "0", "expected a whole number of at least 1, got '0'"),
    ],
)
def test_a_wrong_number_is_wrong_usage(
    option: str, value: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "m", option, value])
    assert reason in capsys.readouterr().err
