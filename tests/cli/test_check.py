"""`m2f check`: the exit status is the examination's, and the next step fits it."""

from types import SimpleNamespace

import pytest

from m2f_trainer.cli.main import main
from m2f_trainer.doctor import examine, summary


@pytest.mark.parametrize(
    ("status", "step"),
    [
        (0, "m2f train dinov3_vits16plus_1024 --dataset_name 'my coco'"),
        (1, "m2f check 'my coco' --fix corrected"),
        (examine.UNUSABLE, "m2f check 'my coco'"),
    ],
)
def test_the_next_step_depends_on_what_was_found(
    status: int, step: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "examine", lambda *_: SimpleNamespace(status=status))
    monkeypatch.setattr(summary, "to_text", lambda result: f"status {result.status}")
    assert main(["check", "my coco"]) == status
    out = capsys.readouterr().out
    assert out.startswith(f"status {status}\n")
    assert out.endswith(f"Next:\n  {step}\n")
