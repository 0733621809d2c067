"""Files of a run are written completely or not at all, and read back unchanged."""

import os
from pathlib import Path

import pytest

from m2f_trainer import run_folder
from m2f_trainer.errors import ModelFolderError
from m2f_trainer.run_folder import (
    curves_of,
    load_run,
    load_runs,
    newest_evaluated_checkpoint,
    read_json,
    read_metrics,
    write_atomically,
    write_json,
    write_metrics,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_into_missing_folders_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "new" / "a.txt", "one\r\ntwo\n")
    assert path.read_bytes() == b"one\r\ntwo\n"
    assert names(path.parent) == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "a.txt", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write_atomically(tmp_path, "text")


def test_no_link_is_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("untouched")
    path = tmp_path / "a.txt"
    path.symlink_to(outside)
    (tmp_path / f".a.txt.{os.getpid()}").symlink_to(outside)
    write_atomically(path, "new")
    assert (outside.read_text(), path.read_text(), path.is_symlink()) == ("untouched", "new", False)


def test_a_name_that_is_not_utf_8_is_escaped(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "a.txt", "photo\udce9.jpg").read_text() == "photo\\udce9.jpg"


def test_written_metrics_are_read_back_to_the_last_bit(tmp_path: Path) -> None:
    metrics = {"map_50": 0.1 + 0.2, "map": 1 / 3}
    path = write_metrics(metrics, tmp_path / "metrics.json")
    assert read_metrics(path) == metrics
    assert list(read_metrics(path)) == ["map", "map_50"]


def test_a_missing_json_file_is_an_empty_object_and_a_damaged_one_an_error(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") == {}
    for text, message in (('{"a": 1', "can't be read as JSON"), ("[1]", "expected a JSON object, got a list")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ModelFolderError, match=message):
            read_json(tmp_path / "a.json")


def test_an_unfinished_run_is_read_from_its_newest_evaluated_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (9, 10):
        write_json(run / f"checkpoint-{step}" / "evaluation.json", {"step": step})
    (run / "checkpoint-11").mkdir()
    write_json(run / "checkpoint-10" / "metrics.json", {"eval_map": 0.5})
    write_json(run / "checkpoint-10" / "trainer_state.json", {"log_history": [{"step": 10, "loss": 1.0, "epoch": 2}]})
    found = load_run(run)
    assert newest_evaluated_checkpoint(run) == run / "checkpoint-10"
    assert (found.name, found.details, found.figures, found.recipe) == ("run", {"step": 10}, {"eval_map": 0.5}, {})
    assert found.curves == {"loss": [(10, 1.0)]}


@pytest.mark.parametrize(("step", "read"), [(10, "run"), (12, "checkpoint-12")])
def test_a_finished_run_that_was_resumed_is_read_from_its_newer_checkpoint(
    step: int, read: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for folder, at in ((run, 10), (run / f"checkpoint-{step}", step)):
        write_json(folder / "evaluation.json", {"of": folder.name})
        write_json(folder / "trainer_state.json", {"global_step": at})
        write_json(folder / "metrics.json", {})
    assert load_run(run).details == {"of": read}


def test_a_run_that_is_given_twice_is_read_once(tmp_path: Path) -> None:
    for name in ("evaluation.json", "metrics.json"):
        write_json(tmp_path / "run" / name, {"a": 1})
    assert [run.name for run in load_runs([tmp_path / "run", tmp_path / "run" / ".." / "run"])] == ["run"]


def test_a_folder_without_an_evaluation_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"expected evaluation\.json .* m2f evaluate MODEL DATASET"):
        load_run(tmp_path)


def test_runs_are_named_by_as_much_of_their_paths_as_makes_them_differ(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        write_json(folder / "evaluation.json", {"x": 1})
    assert [run.name for run in load_runs(folders)] == ["a/run", "b/run"]
    assert [run.name for run in load_runs(folders[:1])] == ["run"]


def test_of_a_step_that_was_logged_twice_the_last_value_counts() -> None:
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "note": "x"}, {"step": 1, "loss": 1.0}]
    assert curves_of({"log_history": history}) == {"loss": [(1, 1.0), (2, 2.0)]}


def test_every_file_name_is_explained_in_the_module() -> None:
    files = [value for name, value in vars(run_folder).items() if name.isupper() and isinstance(value, str)]
    text = run_folder.__doc__ or ""
    assert "recipe.json" in files
    unexplained = {value for value in files if value not in text} - {run_folder.REMEDY}
    assert unexplained == {"training_args.bin"}, "the Trainer's pickle, which is deleted"
