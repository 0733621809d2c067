"""`m2f train`: from command line to recipe to run."""

import json
import shutil
from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from m2f_trainer.config.recipe import load_recipe, save_recipe
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.run_folder import RECIPE
from tests.cli.stand_in import stand_in
from tests.model.tiny import VIT, tiny_model

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


@pytest.mark.parametrize("resume", ["true", "auto", "runs/a/checkpoint-2"])
def test_a_resumed_run_without_a_recipe_keeps_that_of_its_checkpoint(
    resume: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    stand_in(monkeypatch, "m2f_trainer.training.run", train=seen.append)
    monkeypatch.chdir(tmp_path)
    data = write_sample(tmp_path / "set", images=(4, 2, 0))
    options = ["--backbone_config", json.dumps(VIT), "--learning_rate", "3e-3", "--num_queries", "30", "--bf16", "true"]
    first = load_recipe(["--dataset_name", str(data), "--output_dir", "runs/moved_since", *options])
    for step in (2, 10):
        (tmp_path / f"runs/a/checkpoint-{step}").mkdir(parents=True)
        save_recipe(first, tmp_path / f"runs/a/checkpoint-{step}" / RECIPE)
    given = ["--output_dir", "runs/a"] if resume in ("true", "auto") else []
    assert main(["train", *given, "--resume_from_checkpoint", resume, "--learning_rate", "1e-3"]) == 0
    recipe = seen[0]
    assert (recipe.model, recipe.data) == (first.model, first.data)
    assert (recipe.train.bf16, recipe.train.learning_rate, recipe.train.output_dir) == (True, 1e-3, "runs/a")
    step = 2 if resume.endswith("2") else 10
    message = f"No recipe is given. The run goes on with that of its checkpoint, runs/a/checkpoint-{step}/recipe.json\n"
    assert capsys.readouterr().out.startswith(message)


@pytest.mark.parametrize("resume", ["true", "auto"])
def test_a_command_with_init_from_is_repeated_to_resume_where_that_model_is_gone(
    resume: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The backbone, which the command does not give, is that of the checkpoint's recipe."""
    seen = []
    stand_in(monkeypatch, "m2f_trainer.training.run", train=seen.append)
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("runs/first")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"dataset_name": "coco", "image_height": 64, "image_width": 64}))
    command = ["train", str(recipe), "--init_from", "runs/first", "--output_dir", "runs/a", "--resume_from_checkpoint"]
    assert main([*command, "auto"]) == 0
    (tmp_path / "runs/a/checkpoint-2").mkdir(parents=True)
    save_recipe(seen[0], tmp_path / "runs/a/checkpoint-2" / RECIPE)
    shutil.rmtree("runs/first")
    assert main([*command, resume]) == 0
    first, again = (json.loads(json.dumps(vars(recipe.model))) for recipe in seen)  # as fingerprints have them
    assert again == first
    assert again["backbone_config"]["hidden_size"] == 32


def test_a_run_that_may_be_resumed_but_has_no_checkpoint_is_a_new_one(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, "m2f_trainer.training.run", train=lambda recipe: None)
    data = write_sample(tmp_path / "set", images=(4, 2, 0))
    options = ["--backbone_config", json.dumps(VIT), "--output_dir", str(tmp_path / "run")]
    assert main(["train", "--dataset_name", str(data), *options, "--resume_from_checkpoint", "auto"]) == 0
    assert "Chosen for this dataset and machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bakcbone x", "Unknown option --bakcbone on the command line: the nearest is --backbone."),
        ("--seed x", "On the command line: argument --seed: invalid int value: 'x'."),
        ("--seed 1 --seed 2", "--seed is given twice on the command line."),
    ],
)
def test_a_wrong_option_is_wrong_usage_with_one_message_and_no_traceback(
    options: str, message: str, capsys: Captured
) -> None:
    assert main(["train", *options.split()]) == 2, "as of other commands"
    assert capsys.readouterr().err.startswith(f"m2f train: {message}")


def test_a_wrong_option_in_a_recipe_is_an_error_of_that_file(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"bakcbone": "x"}')
    assert main(["train", str(tmp_path / "recipe.json")]) == 1
    assert "Unknown option bakcbone in " in capsys.readouterr().err
