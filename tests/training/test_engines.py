"""Two ranks train as one process does, with DDP, FSDP2 and DeepSpeed."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.run_folder import read_metrics
from m2f_trainer.training.checkpointing.checkpoints import damage
from m2f_trainer.training.evaluate import evaluate_folder
from m2f_trainer.training.run import train
from tests.faults.tiny import losses
from tests.training.engines import GRADIENTS, engine
from tests.training.runs import ROOT, m2f, write_tiny

pytestmark = pytest.mark.timeout(1200)  # up to three launches, on a machine that others keep busy
SETTINGS: dict[str, Any] = {
    "max_steps": 3, "gradient_accumulation_steps": 2, "checkpointing_steps": 3, "ema_decay": 0.9,
    "max_grad_norm": 0.5, "load_best_model_at_end": False,
    "adam_epsilon": 1e-4,  # Adam's first steps are of gradients' signs, and where these are 0 rounding decides
}  # fmt: skip


def write_recipe(folder: Path, **fields: object) -> Path:
    """Twelve training images, the fifth without objects; in validation images one object each, the whole image."""
    recipe = write_tiny(folder, images=(12, 3, 0), **{**SETTINGS, **fields})
    path = folder / "data" / "valid" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"] = [whole_image(image) for image in content["images"]]
    path.write_text(json.dumps(content))
    return recipe


def whole_image(image: dict[str, Any]) -> dict[str, Any]:
    """An object that even untrained queries meet."""
    width, height = image["width"], image["height"]
    return {
        "id": image["id"], "image_id": image["id"], "category_id": 1, "iscrowd": 0, "area": width * height,
        "bbox": [0, 0, width, height], "segmentation": [[0, 0, width, 0, width, height, 0, height]],
    }  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, four images a step: twice two."""
    folder = tmp_path_factory.mktemp("one")
    with engine("one"):
        train(load_recipe([str(write_recipe(folder))]))
    return folder / "run"


def of_two(name: str, folder: Path, *options: object, **fields: object) -> Path:
    """The same run over two ranks, twice one image a step on each."""
    recipe = write_recipe(folder, per_device_train_batch_size=1, **fields)
    done = m2f(name, "train", recipe, *options, ranks=2, module="tests.training.engines", timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def history(checkpoint: Path) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return entries


def check_same(one: Path, other: Path) -> None:
    """Losses, norms and rates of all steps, the last step's clipped gradients, figures and weights."""
    checkpoints = [folder / "checkpoint-3" for folder in (one, other)]
    for expected, found in zip(*map(history, checkpoints), strict=True):
        for key in {"loss", "grad_norm", "learning_rate", "eval_map", "eval_box_map"} & expected.keys():
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (key, expected["step"])
    assert read_metrics(checkpoints[0] / "metrics.json")["eval_box_map"] > 0
    compare(*(load_file(folder / "model.safetensors") for folder in checkpoints))
    assert damage(checkpoints[1]) is None


def compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], within: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-3)
        assert difference <= within, f"{name}: {difference}"


def check_gradients(one: Path, other: Path) -> None:
    compare(*(torch.load(folder / GRADIENTS) for folder in (one, other)))


def test_two_ranks_train_and_score_as_one_process(one: Path, tmp_path: Path) -> None:
    two = of_two("ddp", tmp_path)
    check_same(one, two)
    check_gradients(one, two)
    again = evaluate_folder(str(two), str(tmp_path / "data"), batch_size=1)
    assert again["eval_map"] == pytest.approx(read_metrics(two / "metrics.json")["eval_map"], abs=1e-9)


@pytest.mark.slow
def test_weights_sharded_over_two_ranks_train_and_score_as_one_process(one: Path, tmp_path: Path) -> None:
    two = of_two("fsdp", tmp_path, fsdp=True)
    check_same(one, two)
    check_gradients(one, two)
    config = json.loads((two / "config.json").read_text())
    assert set(config["auto_map"].values()) == {"mask2former.M2FConfig", "mask2former.M2FModel"}
    assert {path.name for path in two.glob("*.py")} == {path.name for path in one.glob("*.py")}
    assert load_model(str(two / "checkpoint-3")).config.num_queries == 10


@pytest.mark.slow
def test_a_sharded_run_that_is_resumed_is_the_uninterrupted_one(tmp_path: Path) -> None:
    two = of_two("fsdp", tmp_path, fsdp=True, checkpointing_steps=1, load_best_model_at_end=True)
    whole = load_file(two / "checkpoint-3" / "model.safetensors")
    shutil.rmtree(two / "checkpoint-3")
    of_two("fsdp", tmp_path, "--resume_from_checkpoint", "true", fsdp=True, checkpointing_steps=1)
    compare(whole, load_file(two / "checkpoint-3" / "model.safetensors"), 0.0)


@pytest.mark.slow
def test_weights_sharded_in_a_bfloat16_run_stay_float32_and_train_as_in_one_process(tmp_path: Path) -> None:
    with engine("one"):
        train(load_recipe([str(write_recipe(tmp_path / "one", bf16=True))]))
    two = of_two("fsdp", tmp_path / "two", fsdp=True, bf16=True)
    expected, found = (losses(folder) for folder in (tmp_path / "one" / "run", two))
    assert found == pytest.approx(expected, rel=1e-2)
    assert {tensor.dtype for tensor in load_file(two / "model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_ranks_under_zero_train_score_and_resume_as_one_process(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"ema_decay": None, "lr_scheduler_type": "linear", "head_first_steps": 1}
    fields |= {"layer_decay": 0.8, "checkpointing_steps": 1, "load_best_model_at_end": True}
    with engine("one"):
        train(load_recipe([str(write_recipe(tmp_path / "one", **fields))]))
    zero = json.loads((ROOT / "recipes" / "engines" / "deepspeed_zero2.json").read_text())
    (tmp_path / "float32.json").write_text(json.dumps({**zero, "torch_autocast": {"enabled": False}}))
    fields |= {"deepspeed": str(tmp_path / "float32.json"), "use_cpu": False}
    fields |= {"accelerator_config": {"use_configured_state": True}}
    two = of_two("deepspeed", tmp_path / "two", **fields)
    check_same(tmp_path / "one" / "run", two)
    shutil.rmtree(two / "checkpoint-3")
    of_two("deepspeed", tmp_path / "two", "--resume_from_checkpoint", "true", **fields)
    check_same(tmp_path / "one" / "run", two)
