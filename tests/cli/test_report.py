"""`m2f report`: options and next step."""

from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in


def test_the_runs_are_passed_on_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def write_report(runs: list[Path], output: Path, load_images: bool) -> Path:
        seen.append((runs, output, load_images))
        return output

    stand_in(monkeypatch, "m2f_trainer.evaluation.report", write_report=write_report)
    monkeypatch.chdir(tmp_path)
    for run in ("runs/a", "runs/b"):
        Path(run).mkdir(parents=True)
    Path("runs/a/config.json").touch()  # runs/b is the output of an evaluation
    assert main(["report", "runs/b", "runs/a", "--output", "page.html", "--images"]) == 0
    assert seen == [([Path("runs/b"), Path("runs/a")], Path("page.html"), True)]
    assert capsys.readouterr().out == "page: page.html\n\nNext:\n  m2f predict runs/a IMAGES\n"
