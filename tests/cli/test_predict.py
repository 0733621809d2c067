"""`m2f predict`: options and next steps."""

from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in


def test_the_options_are_passed_on_and_next_steps_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def predict_folder(*values: object) -> str:
        seen.append(values)
        return "predictions"

    stand_in(monkeypatch, "m2f_trainer.inference.predict", predict_folder=predict_folder, PredictOptions=dict)
    model = str(tmp_path)
    assert main(["predict", model, "a.png", "b", "--recursive", "--threshold", "0.3", "--tile", "512"]) == 0
    options = {"threshold": 0.3, "recursive": True, "batch_size": 4, "tile": 512, "overlap": None}
    options |= {"pixel_range": None, "dataset": False, "precision": "auto"}
    assert seen == [(model, [Path("a.png"), Path("b")], Path("predictions"), options)]
    out = capsys.readouterr().out
    assert out.startswith("Overlays and predictions are in predictions.")
    assert out.endswith(f"Next:\n  m2f export {model}\n  m2f push {model} NAME/MODEL\n")


@pytest.mark.parametrize("command", [["predict", "m", "in"], ["serve", "m"]], ids=["predict", "serve"])
@pytest.mark.parametrize("text", ["nan", "inf", "7", "50", "-0.1"])
def test_a_threshold_that_no_score_reaches_is_wrong_usage(
    command: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command, f"--threshold={text}"])
    assert f"expected auto or a number from 0 to 1, got '{text}'" in capsys.readouterr().err


def test_help_says_what_tiles_do_with_larger_images(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--help"])
    assert "larger ones are refused, except with tiles" in " ".join(capsys.readouterr().out.split())


def test_a_negative_tile_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "m", "in", "--tile", "-5"])
    assert "expected a whole number of at least 0, got '-5'" in capsys.readouterr().err
