"""Sharding is applied as the recipe says, or refused."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m2f_trainer.config.recipe import load_recipe, save_recipe
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.distributed import full_tensor
from m2f_trainer.errors import RecipeError
from m2f_trainer.model.lora import set_tuning
from m2f_trainer.training.run import train
from m2f_trainer.training.sharding import require_engine
from tests.model.tiny import CONVNEXT, tiny_model
from tests.training.runs import write_tiny

ZERO_2 = {"zero_optimization": {"stage": 2}}


def test_sharding_where_accelerate_would_not_shard_is_refused_with_the_way_out(tmp_path: Path) -> None:
    recipe = load_recipe([str(write_tiny(tmp_path, fsdp=True))])
    with pytest.raises(RecipeError, match=r"fsdp needs several accelerators .* recipes/torchrun_single_node.sh"):
        train(recipe)


def test_a_sharded_recipe_survives_saving(tmp_path: Path) -> None:
    recipe = load_recipe(["--dataset_name", "coco", "--fsdp", "true"])
    save_recipe(recipe, tmp_path / "saved.json")
    assert load_recipe([str(tmp_path / "saved.json")]) == recipe


def arguments(**fields: Any) -> TrainArguments:
    return TrainArguments(use_cpu=True, report_to="none", **fields)


def test_checkpoints_without_a_whole_model_are_refused() -> None:
    parts = arguments(fsdp=True, fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})
    with pytest.raises(RecipeError, match="with state_dict_type: SHARDED_STATE_DICT checkpoints would have no model"):
        require_engine(parts, tiny_model())


def test_lora_is_refused_since_its_checkpoints_would_not_load_again() -> None:
    model = tiny_model()
    set_tuning(model, "lora")
    with pytest.raises(RecipeError, match="leave fsdp and deepspeed out; torchrun alone"):
        require_engine(arguments(fsdp=True), model)


@pytest.mark.parametrize(
    ("config", "fields", "advice"),
    [
        ({"zero_optimization": {"stage": 3}}, {}, "ZeRO 3 is not supported.*Use --fsdp true"),
        ({"optimizer": {}, "scheduler": {}}, {}, "remove optimizer and scheduler from its file"),
        (ZERO_2, {"bf16": True}, '"torch_autocast" in its file'),
        (ZERO_2, {"ema_decay": 0.9}, "leave ema_decay out"),
        (ZERO_2, {"lr_scheduler_type": "polynomial"}, "--lr_scheduler_type linear"),
    ],
)
def test_what_deepspeed_would_drop_or_spoil_is_refused(config: Any, fields: Any, advice: str) -> None:
    asked = arguments(**{"lr_scheduler_type": "linear", **fields})
    asked.deepspeed = config
    vars(asked)["hf_deepspeed_config"] = SimpleNamespace(config=config)
    with pytest.raises(RecipeError, match=advice):
        require_engine(asked, tiny_model())


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed here")
def test_missing_deepspeed_is_an_error_with_advice() -> None:
    with pytest.raises(RecipeError, match=r"pip install .*deepspeed.* --fsdp true"):
        arguments(deepspeed="recipes/engines/deepspeed_zero2.json")


def test_accelerate_finds_no_word_embeddings_to_shard() -> None:
    assert tiny_model().get_input_embeddings() is None


@pytest.mark.parametrize(("backbone", "layer"), [(None, "DINOv3ViTLayer"), (CONVNEXT, "DINOv3ConvNextLayer")])
def test_the_backbone_is_sharded_layer_by_layer(backbone: Any, layer: str) -> None:
    model = tiny_model(backbone)
    units = set(model._no_split_modules)
    assert {layer, "Encoder", "PixelDecoder", "QueryDecoder"} <= units <= {type(m).__name__ for m in model.modules()}


def test_weights_without_elements_do_not_train_since_fsdp_refuses_them() -> None:
    assert all(parameter.numel() for parameter in tiny_model().parameters() if parameter.requires_grad)


def test_an_unsharded_tensor_is_whole() -> None:
    tensor = torch.ones(2)
    assert full_tensor(tensor) is tensor
