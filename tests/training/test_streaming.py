"""A run on a streamed dataset: on one process and on two, and resumed."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import RecipeError
from m2f_trainer.training.run import train
from tests.data.test_hub_dataset import as_pushed
from tests.training.runs import TINY, m2f


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample set as it lies on the Hub: 7 training images in two files."""
    folder = tmp_path_factory.mktemp("streamed")
    splits = load_coco(write_sample(folder / "set", images=(7, 3, 0)), cache_dir=folder / "cache")
    kept = datasets.DatasetDict({split: splits[split] for split in ("train", "valid")})
    return as_pushed(kept, folder / "pushed", files=2)


def write_recipe(pushed: str, folder: Path, **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.json"
    given = {**TINY, "dataset_name": pushed, "streaming": True, "output_dir": str(folder / "run"), **fields}
    path.write_text(json.dumps({**given, "max_steps": 6, "checkpointing_steps": 3}))
    return path


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "run/checkpoint-6/trainer_state.json").read_text())
    found = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(found) == 6
    return found


@pytest.mark.slow
def test_a_streamed_run_resumes_as_if_never_stopped_and_ends(pushed: str, tmp_path: Path) -> None:
    recipe = write_recipe(pushed, tmp_path, dataloader_num_workers=2)
    train(load_recipe([str(recipe)]))
    first = losses(tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    train(load_recipe([str(recipe), "--resume_from_checkpoint", "true"]))
    assert losses(tmp_path) == first
    before = (tmp_path / "run/model.safetensors").read_bytes()
    train(load_recipe([str(recipe), "--resume_from_checkpoint", "true"]))
    assert (tmp_path / "run/model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_two_processes_resume_a_streamed_run_as_if_never_stopped(pushed: str, tmp_path: Path) -> None:
    recipe = write_recipe(pushed, tmp_path)
    whole = m2f("train", recipe, ranks=2)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert "is streamed: its first 7 training images were checked" in whole.stderr
    first = losses(tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    resumed = m2f("train", recipe, "--resume_from_checkpoint", "true", ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert losses(tmp_path) == first


def test_streaming_asks_for_steps_and_has_no_copy_paste() -> None:
    options = ["--dataset_name", "user/name", "--streaming", "true"]
    with pytest.raises(RecipeError, match=r"max_steps=-1: a streamed dataset has no length.* Set it"):
        load_recipe(options)
    with pytest.raises(RecipeError, match="Set copy_paste to 0, or leave streaming out"):
        load_recipe([*options, "--max_steps", "5", "--augmentation", "strong"])
    assert load_recipe([*options, "--max_steps", "5"]).data.streaming
