"""No link is followed when a command writes; text in tables and terminals can't execute anything."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from m2f_trainer.data.synthetic import write_sample
from tests.security.conftest import Command, Ran, change

PRECIOUS = "not to be touched\n"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of the user that links in received folders point to."""
    path = tmp_path / "precious.txt"
    path.write_text(PRECIOUS)
    return path


@pytest.mark.parametrize("name", [".lock", "README.md", "config.json", "recipe.json", "pictures/worst_1.jpg"])
def test_a_run_follows_no_link_in_its_folder(
    name: str, precious: Path, m2f: Command, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    ran = m2f("train", recipe())
    assert ran.status == 1
    assert f"{link} is a link" in ran.err
    assert precious.read_text() == PRECIOUS


@pytest.mark.parametrize("name", [".staging", "pictures", "adapter", "feature_cache", "runs", "Adapter"])
def test_a_run_follows_no_link_to_a_folder(
    name: str, m2f: Command, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(elsewhere)
    assert m2f("train", recipe()).status == 1
    assert not list(elsewhere.iterdir())


def test_a_run_accepts_a_link_to_a_folder_that_it_only_reads(
    dataset: Path, m2f: Command, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Such as a user's dataset on another disk."""
    link = tmp_path / "run" / "data"
    link.parent.mkdir()
    link.symlink_to(dataset)
    before = sorted(dataset.rglob("*"))
    ran = m2f("train", recipe(dataset_name=str(link)))
    assert ran.status == 0, ran.err
    assert link.is_symlink()
    assert sorted(dataset.rglob("*")) == before


def test_a_run_refuses_a_link_to_nothing(m2f: Command, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A file would be created there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").symlink_to(tmp_path / "elsewhere.json")
    assert m2f("train", recipe()).status == 1
    assert not (tmp_path / "elsewhere.json").exists()


def test_predictions_follow_no_link(precious: Path, m2f: Command, model: Path, photo: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    for name in (f"{photo.stem}.instances.png", "predictions.json", "predictions.csv"):
        (output / name).symlink_to(precious)
    ran = m2f("predict", model, photo, "--output_dir", output, "--threshold", "0")
    assert ran.status == 0, ran.err
    assert precious.read_text() == PRECIOUS
    assert not (output / f"{photo.stem}.instances.png").is_symlink()


def test_an_evaluation_follows_no_link(
    precious: Path, m2f: Command, model: Path, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    output.mkdir()
    for name in ("metrics.json", "predictions.json", "classes.csv", "confusion.png", "precision_recall.png"):
        (output / name).symlink_to(precious)
    ran = m2f("evaluate", model, dataset, "--output_dir", output)
    assert ran.status == 0, ran.err
    assert precious.read_text() == PRECIOUS


def test_an_export_follows_no_link(precious: Path, m2f: Command, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    output.mkdir()
    (output / "model.pt2").symlink_to(precious)
    ran = m2f("export", model, "--format", "torch", "--output_dir", output)
    assert ran.status == 1
    assert "is a link" in ran.err
    assert precious.read_text() == PRECIOUS


def predicted(m2f: Command, model: Path, photo: Path, folder: Path, name: str) -> Ran:
    """Predict a copy of a photo that has this name."""
    folder.mkdir()
    shutil.copy(photo, folder / name)
    return m2f("predict", model, folder, "--output_dir", folder / "out", "--threshold", "0")


def test_predictions_csv_holds_neither_formulas_nor_escape_sequences(
    m2f: Command, model: Path, photo: Path, tmp_path: Path
) -> None:
    change(model / "config.json", categories=[{"id": k, "name": f"=cmd|'/C calc'!A{k}\x1b[2J"} for k in (1, 2, 3)])
    ran = predicted(m2f, model, photo, tmp_path / "in", "\x1b]0;owned\x07.jpg")
    assert ran.status == 0, ran.err
    text = (tmp_path / "in" / "out" / "predictions.csv").read_text()
    assert "\x1b" not in text
    assert "\x07" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert rows
    assert all(row["category"].startswith("'=") for row in rows)


def test_errors_show_escape_sequences_of_file_names_as_text(m2f: Command, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "\x1b]0;owned\x07\u202egpj.jpg").write_text("no image")
    ran = m2f("predict", model, folder, "--output_dir", tmp_path / "out")
    assert ran.status == 1
    assert not {"\x1b", "\x07", "\u202e"} & set(ran.err + ran.out)
    assert r"\x1b]0;owned\x07\u202egpj.jpg" in ran.err


def test_a_check_shows_escape_sequences_of_a_dataset_as_text(m2f: Command, tmp_path: Path) -> None:
    data = write_sample(tmp_path / "data", images=(3, 2, 0))
    path = data / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "\x1b[2Jcircle"
    content["images"][0]["file_name"] = "\x1b[31mmissing.jpg"
    path.write_text(json.dumps(content))
    ran = m2f("check", data)
    assert ran.status != 0
    assert "\x1b" not in ran.err + ran.out


def test_a_log_shows_escape_sequences_as_text(m2f: Command, model: Path, photo: Path, tmp_path: Path) -> None:
    m2f("predict", model, photo, "--output_dir", tmp_path / "out")
    handler = logging.lastResort
    assert handler is not None
    record = logging.LogRecord("m2f", logging.WARNING, "", 0, "file %s", ("\x1b[2J\r.jpg",), None)
    assert handler.format(record) == r"file \x1b[2J\x0d.jpg"
