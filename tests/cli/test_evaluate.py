"""`m2f evaluate`: options and table."""

import pytest

from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in


def test_the_metrics_and_the_next_step_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def evaluate_folder(*values: object) -> dict[str, float]:
        seen.append(values)
        return {"eval_map": 0.5, "eval_map_class/cat": 0.25}

    stand_in(monkeypatch, "m2f_trainer.training.evaluate", evaluate_folder=evaluate_folder)
    assert (
        main(
            ["evaluate", "runs/a", "coco", "--split", "test", "--annotations", "test=a.json", "--images", "test=photos"]
        )
        == 0
    )
    assert seen == [
        ("runs/a", "coco", "test", None, None, ["test=a.json"], ["test=photos"], "auto", None, "auto", False)
    ]
    out = capsys.readouterr().out
    assert "masks       50.0" in out
    assert "cat        25.0" in out
    assert out.endswith("  m2f predict runs/a IMAGES\n")
