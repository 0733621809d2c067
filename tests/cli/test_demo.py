"""`m2f demo`: options and next steps."""

from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in


def test_the_options_are_passed_on_and_next_steps_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "m2f_trainer.training.demo", demo=lambda folder, backbone, say: say(f"{folder} {backbone}"))
    assert main(["demo", "--output_dir", "d", "--backbone", "dinov2-small"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{Path('d')} dinov2-small\n\nNext:\n  m2f check my_coco\n  m2f train ")
