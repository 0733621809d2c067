"""Sharding that was asked for happens, or is refused."""

from pathlib import Path

import pytest
import torch

from m2f_trainer.errors import RecipeError
from m2f_trainer.recipe import load_recipe, save_recipe
from m2f_trainer.training.run import train
from m2f_trainer.training.sharding import whole
from tests.model.tiny import tiny_model
from tests.training.runs import write_tiny


def test_sharding_where_accelerate_would_not_shard_is_refused_with_the_way_out(tmp_path: Path) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path, fsdp=True))])
    with pytest.raises(RecipeError, match=r"fsdp shards over several accelerators .* recipes/torchrun_single_node.sh"):
        train(recipe)


def test_a_sharded_recipe_survives_saving(tmp_path: Path) -> None:
    recipe = load_recipe(["--dataset_name", "coco", "--fsdp", "true"])
    save_recipe(recipe, tmp_path / "saved.json")
    assert load_recipe([str(tmp_path / "saved.json")]) == recipe


def test_accelerate_finds_no_word_embeddings_to_shard() -> None:
    assert tiny_model().get_input_embeddings() is None


def test_an_unsharded_tensor_is_whole() -> None:
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
