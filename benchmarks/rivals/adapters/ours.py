"""Our own command line, as a user would type it: `m2f train RECIPE ...`, then `m2f evaluate`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rivals.task import Task, serve


def train(task: Task) -> dict[str, Any]:
    """Train for the planned steps; its own evaluation is of one image, once, at the end."""
    folder = Path(task.folder, "run")
    given = {
        "dataset_name": task.dataset,
        "backbone": task.backbone,
        "output_dir": folder,
        "overwrite_output_dir": "true",
        "seed": task.seed,
        "max_steps": task.steps,
        "checkpointing_steps": task.steps,
        "max_eval_samples": 1,
    }
    fixed = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    _m2f("train", task.settings["recipe"], *fixed, *task.settings.get("options", []))
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    return {"images": task.steps * recipe["per_device_train_batch_size"], "steps": task.steps}


def predict(task: Task) -> list[dict[str, Any]]:
    """The predictions that its evaluation scores."""
    scored = Path(task.folder, "scored")
    options = task.settings.get("evaluate_options", [])
    _m2f("evaluate", str(Path(task.folder, "run")), task.dataset, "--output_dir", str(scored), *options)
    results: list[dict[str, Any]] = json.loads((scored / "predictions.json").read_text(encoding="utf-8"))
    return results


def _m2f(*words: str) -> None:
    print("m2f", *words, flush=True)
    subprocess.run([sys.executable, "-m", "m2f_trainer", *words], check=True)


if __name__ == "__main__":
    serve(train, predict)
