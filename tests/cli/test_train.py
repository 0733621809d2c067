"""`m2f train`: from command line to recipe to run."""

import json
from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from m2f_trainer.data.synthetic import write_sample
from tests.cli.stand_in import stand_in
from tests.model.tiny import VIT

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
    assert main(["train", "quickstart", "--dataset_name", "my coco", "--output_dir", "runs/a", "--seed", "7"]) == 0
    assert seen[0].train.seed == 7
    assert capsys.readouterr().out.endswith("Next:\n  m2f evaluate runs/a 'my coco'\n  m2f predict runs/a IMAGES\n")


def test_given_annotation_files_are_recipe_fields_and_stay_in_the_next_step(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    stand_in(monkeypatch, "m2f_trainer.training.run", train=seen.append)
    files = ["--annotations", "train=a.json", "val=b.json", "--images", "val=my photos"]
    assert main(["train", "quickstart", "--dataset_name", "coco", "--output_dir", "runs/a", *files]) == 0
    assert seen[0].data.annotations == ["train=a.json", "val=b.json"]
    step = "m2f evaluate runs/a coco --annotations train=a.json val=b.json --images 'val=my photos'\n"
    assert step in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_trains_nothing(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "m2f_trainer.training.run", dry_run=lambda recipe: f"plan of {recipe.data.dataset_name}")
    assert main(["train", "quickstart", "--dataset_name", "coco", "--dry_run"]) == 0
    assert capsys.readouterr().out == "plan of coco\n"


def test_without_a_recipe_the_fields_are_chosen_for_the_dataset_and_printed(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    stand_in(monkeypatch, "m2f_trainer.training.run", train=seen.append)
    data = write_sample(tmp_path / "set", images=(4, 2, 0))
    options = ["--dataset_name", str(data), "--backbone_config", json.dumps(VIT), "--max_minutes", "3"]
    assert main(["train", *options]) == 0
    assert seen[0].train.max_minutes == 3
    assert (seen[0].model.num_queries, seen[0].model.tune) == ("auto", "frozen")
    out = capsys.readouterr().out
    assert out.startswith("No recipe is given. Chosen for this dataset and machine:\n")
    assert "num_queries" in out
    assert "max_minutes" not in out


def test_a_wrong_option_gives_one_message_and_no_traceback(capsys: Captured) -> None:
    assert main(["train", "--bakcbone", "x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("m2f train: Unknown option --bakcbone on the command line: the nearest is --backbone.")
