"""Each recipe field is defined by one row and nowhere else."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import pytest

from m2f_trainer.config import field_help, recipe
from m2f_trainer.config.arguments import DataArguments, ModelArguments
from m2f_trainer.config.fields import Theme, check_ranges, option, options_of
from m2f_trainer.config.recipe import GROUPS, load_recipe, save_recipe
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import RecipeError
from m2f_trainer.training.checkpointing.fingerprint import differences, fingerprint


@dataclass
class WiderData(DataArguments):
    crop_size: int = option(
        640, "Train on tiles of this side, in pixels.", "data", at_least=64, changes_results=True, auto=True
    )


@pytest.fixture
def wider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipe's dataclasses, with a field more."""
    monkeypatch.setattr(recipe, "GROUPS", (ModelArguments, WiderData, TrainArguments))
    for cached in (recipe.hints, recipe.rows):
        cached.cache_clear()
    yield
    for cached in (recipe.hints, recipe.rows):
        cached.cache_clear()


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_we_declare_has_a_row_with_help_and_theme(group: type) -> None:
    declared = {one.name for one in fields(group)} & set(group.__annotations__)
    assert declared == set(options_of(group))
    assert all(row.help.endswith(".") and row.theme in get_args(Theme) for row in options_of(group).values())


def test_every_theme_has_a_field() -> None:
    assert {row.theme for group in GROUPS for row in options_of(group).values()} == set(get_args(Theme))


def test_a_model_is_defined_only_by_fields_that_change_results() -> None:
    rows = [row for group in GROUPS for row in options_of(group).values()]
    assert any(row.defines_model for row in rows)
    assert all(row.changes_results for row in rows if row.defines_model)


@pytest.mark.usefixtures("wider")
def test_a_new_field_is_read_saved_checked_and_explained_from_its_row_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"dataset_name": "x", "crop_size": 128}))
    read = load_recipe([str(tmp_path / "a.json")])
    assert vars(read.data)["crop_size"] == 128
    save_recipe(read, tmp_path / "b.json")
    assert load_recipe([str(tmp_path / "b.json")]) == read
    assert vars(load_recipe(["--dataset_name", "x", "--crop_size", "auto"]).data)["crop_size"] == "auto"
    with pytest.raises(RecipeError, match="crop_size: expected at least 64, got 8"):
        load_recipe(["--dataset_name", "x", "--crop_size", "8"])
    with pytest.raises(RecipeError, match="the nearest is --crop_size"):
        load_recipe(["--dataset_name", "x", "--cropsize", "128"])
    assert f"  --crop_size N|auto{' ' * 18}Train on tiles of this side, in pixels. [640]" in field_help.help_of_fields()


@pytest.mark.usefixtures("wider")
def test_a_new_field_is_compared_on_resume_and_an_older_checkpoint_has_its_default(tmp_path: Path) -> None:
    splits = load_coco(write_sample(tmp_path, images=(2, 1, 0)))
    categories = categories_of(splits["train"])
    then, now = (
        fingerprint(load_recipe(["--dataset_name", "x", *given]), splits["train"], splits["valid"], categories, 2)
        for given in ((), ("--crop_size", "128"))
    )
    assert differences(then, now) == {"crop_size": "crop_size was 640, is 128"}
    older = {key: value for key, value in then.items() if key != "crop_size"}
    assert differences(older, then) == {}
    assert differences(older, now) == {"crop_size": "crop_size was 640, is 128"}


def test_bounds_are_inclusive_and_other_values_than_numbers_pass() -> None:
    @dataclass
    class Group:
        share: object = option(None, "A share.", "data", at_least=0, at_most=1)
        most: object = option(None, "A number.", "data", at_most=3)

    for group in (Group(), Group(0, 3), Group(1.0, -5), Group("auto")):
        check_ranges(group)
    with pytest.raises(RecipeError, match=r"share: expected between 0 and 1, got 1\.1"):
        check_ranges(Group(1.1))
    with pytest.raises(RecipeError, match="most: expected at most 3, got 4"):
        check_ranges(Group(most=4))
