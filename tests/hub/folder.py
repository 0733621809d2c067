"""A folder with the files of a trained model and placeholder weights, for tests of cards and uploads."""

import json
import shutil
from pathlib import Path
from typing import Any

from m2f_trainer.model import mask2former

CONFIG = {
    "model_type": "mask2former_dino",
    "auto_map": {"AutoConfig": "mask2former.M2FConfig"},
    "backbone_name": "dinov2-small",
    "backbone_config": {"model_type": "dinov2"},
    "head_checkpoint": None,
    "init_from": None,
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "image_height": 518,
    "image_width": 518,
    "neck": "pyramid",
    "num_queries": 100,
}
METRICS = {"eval_map": 0.5123, "eval_map_50": 0.75, "eval_map_small": -1.0, "eval_box_map": 0.6, "eval_loss": 3.0}
CLASSES = {"eval_map_class/cat": 0.25, "eval_map_class/dog": 0.75}


def write_model(folder: Path, **changes: Any) -> Path:
    """Write the files of `m2f train`, and other files that must not be uploaded."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"dataset_name": "/home/someone/secret/pets", "tune": "frozen", "output_dir": str(folder.resolve())}
    write_json(folder / "config.json", {**CONFIG, **changes})
    write_json(folder / "metrics.json", {**METRICS, **CLASSES})
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "preprocessor_config.json", {"size": {"height": 518, "width": 518}})
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    shutil.copy(str(mask2former.__file__), folder / "mask2former.py")
    for name in ("optimizer.pt", "training_args.bin", "notes.py", ".env", "events.out.tfevents.1", "manifest.json"):
        (folder / name).write_text("stays here")
    (folder / "checkpoint-5").mkdir(exist_ok=True)
    (folder / "checkpoint-5" / "mask2former.py").write_text("stays here")
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"stays here")
    return folder


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")
