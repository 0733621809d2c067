"""`m2f report`: options and next step."""

from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in


def test_the_runs_are_passed_on_in_order(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def write_report(runs: list[Path], output: Path, load_images: bool) -> Path:
        seen.append((runs, output, load_images))
        return output

    stand_in(monkeypatch, "m2f_trainer.evaluation.report", write_report=write_report)
    assert main(["report", "runs/b", "runs/a", "--output", "page.html", "--images"]) == 0
    assert seen == [([Path("runs/b"), Path("runs/a")], Path("page.html"), True)]
    assert capsys.readouterr().out == "page: page.html\n\nNext:\n  m2f predict runs/b IMAGES\n"
