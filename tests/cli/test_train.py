"""`m2f train`: from command line to recipe to run."""

import pytest

from m2f_trainer.cli.main import main
from tests.cli.stand_in import stand_in

Captured = pytest.CaptureFixture[str]


def test_the_help_has_an_example_and_the_recipe_fields(capsys: Captured) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: m2f train [RECIPE.json] [--field value ...]")
    assert "\n  m2f train recipes/" in text
    assert "\n  --head_checkpoint TEXT" in text


def test_the_recipe_is_passed_on_and_next_steps_are_printed(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stand_in(monkeypatch, "m2f_trainer.training.run", train=seen.append)
    assert main(["train", "--dataset_name", "my coco", "--output_dir", "runs/a", "--seed", "7"]) == 0
    assert seen[0].train.seed == 7
    assert capsys.readouterr().out.endswith("Next:\n  m2f evaluate runs/a 'my coco'\n  m2f predict runs/a IMAGES\n")


def test_a_dry_run_prints_the_plan_and_trains_nothing(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "m2f_trainer.training.run", dry_run=lambda recipe: f"plan of {recipe.data.dataset_name}")
    assert main(["train", "--dataset_name", "coco", "--dry_run"]) == 0
    assert capsys.readouterr().out == "plan of coco\n"


def test_a_wrong_option_gives_one_message_and_no_traceback(capsys: Captured) -> None:
    assert main(["train", "--bakcbone", "x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("m2f train: Unknown option --bakcbone on the command line: the nearest is --backbone.")
