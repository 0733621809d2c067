"""`m2f check`: the exit status is the examination's, and the next step fits it."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from m2f_trainer.cli.main import main
from m2f_trainer.cli.train import choose
from m2f_trainer.config.arguments import ModelArguments
from m2f_trainer.config.recipe import backbone_stride, load_recipe
from m2f_trainer.data.problems import Finding
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.doctor import examine, summary
from tests.data.honest import dataset


@pytest.mark.parametrize(
    ("status", "kind", "step"),
    [
        (0, "", "m2f train --dataset_name 'my coco'"),
        (1, "bad-mask", "m2f check 'my coco' --fix corrected"),
        (1, "outside-image", ""),
        (examine.UNUSABLE, "unusable", ""),
    ],
)
def test_the_next_step_depends_on_what_was_found(
    status: int, kind: str, step: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [Finding(kind, "a.json", "message")] if kind else []
    scans = {"train": [SimpleNamespace(objects=[{"iscrowd": False, "findings": []}])]}
    result = SimpleNamespace(status=status, files="", findings=findings, dataset="my coco", splits={}, scans=scans)
    monkeypatch.setattr(examine, "examine", lambda *_, **__: result)
    monkeypatch.setattr(summary, "summary_text", lambda result: f"status {result.status}")
    assert main(["check", "my coco"]) == status
    out = capsys.readouterr().out
    assert out.startswith(f"status {status}\n")
    assert out.endswith(f"Next:\n  {step}\n") if step else "Next" not in out


def test_the_files_are_printed_and_given_ones_stay_in_the_next_step(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_sample(tmp_path / "set", images=(4, 2, 0))
    (data / "train/_annotations.coco.json").rename(data / "mine.json")
    (data / "valid").rename(data / "second")
    files = ["train=mine.json", "val=second/_annotations.coco.json"]
    assert main(["check", str(data), "--annotations", *files, "--images", "train=train"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"dataset {data} (COCO):\n  train mine.json, images in train\n  valid second/_annotations")
    assert out.endswith(f"m2f train --dataset_name {data} --annotations {' '.join(files)} --images train=train\n")
    assert main(["check", str(data), "--annotations", "dev=mine.json"]) == 2
    assert "--annotations dev=mine.json: expected SPLIT=PATH with one of the splits" in capsys.readouterr().out


def test_a_recipe_for_the_dataset_is_written_with_reasons(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = write_sample(tmp_path / "set", images=(4, 2, 0)), tmp_path / "recipe.json"
    assert main(["check", str(data), "--recipe", str(path)]) == 0
    recipe = load_recipe([str(path), "--dataset_name", str(data)])
    out = capsys.readouterr().out
    assert f"recipe: {path}\n" in out
    assert out.endswith(f"Next:\n  m2f train {path} --dataset_name {data}\n")
    assert recipe.data.image_height == recipe.data.image_width


def test_a_recipe_has_the_fields_that_are_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, path = write_sample(tmp_path / "set", images=(4, 2, 0)), tmp_path / "recipe.json"
    size = ["--image_height", "224", "--num_queries", "55"]
    for tile in (64, None):
        words = [*size, "--tile_size", "64"] if tile else size
        assert main(["check", str(data), *words, "--recipe", str(path)]) == 0
        told = capsys.readouterr().out
        assert re.search(r"\n  image_width +224 +given\n", told)
        assert told.endswith(f"Next:\n  m2f train {path} --dataset_name {data}\n")
        assert main(["check", str(data), *words]) == 0
        suggested = capsys.readouterr().out.partition("Next:\n  m2f train ")[2]
        for argv in ([str(path), "--dataset_name", str(data)], shlex.split(suggested)):
            recipe = load_recipe(argv, choose)
            assert (recipe.data.image_height, recipe.data.image_width, recipe.data.tile_size) == (224, 224, tile)
            assert recipe.model.num_queries == 55


def test_a_recipe_has_sides_that_its_backbone_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, path = write_sample(tmp_path / "set", images=(4, 2, 0)), tmp_path / "recipe.json"
    assert main(["check", str(data), "--image_height", "128", "--image_width", "256", "--recipe", str(path)]) == 0
    written = json.loads(path.read_text())
    patch = backbone_stride(ModelArguments(backbone=written["backbone"]))
    sides = written["image_height"], written["image_width"]
    assert [side % patch for side in sides] == [0, 0]
    assert [abs(side - given) * 2 <= patch for side, given in zip(sides, (128, 256), strict=True)] == [True, True]
    if patch == 14:
        assert "given: 128; the backbone needs a multiple of 14" in capsys.readouterr().out
    assert main(["check", str(data), "--image_height", "128", "--image_width", "256"]) == 0
    assert f" --image_height {sides[0]} --image_width {sides[1]}\n" in capsys.readouterr().out


def test_the_next_step_names_no_recipe_that_was_not_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = dataset(tmp_path / "set", lambda coco: coco["annotations"][0].update(category_id=9))
    copy, path = tmp_path / "copy", tmp_path / "recipe.json"
    assert main(["check", str(root), "--fix", str(copy), "--recipe", str(path)]) == 1
    assert not path.exists()
    assert capsys.readouterr().out.endswith(f"Next:\n  m2f train --dataset_name {copy}\n")


def test_an_option_of_the_corrected_copy_needs_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", str(write_sample(tmp_path, images=(1, 1, 0))), "--remove_leaked"]) == 1
    assert "Give --fix FOLDER, too" in capsys.readouterr().err
