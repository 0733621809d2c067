"""Our own command line: `m2f train --dataset_name X --max_minutes M`, then `m2f evaluate`.

Without a recipe, the command chooses the settings for the dataset and the machine. The backbone is given as a folder,
because the Hub is not used. The budget is our option `max_minutes`, which plans the learning rate for the time and then
ends the run; its clock is replaced by the CPU time of the process.
"""

import importlib
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.rivals.task import Task, serve

STOPPING = 5.0
"""CPU seconds reserved for evaluating one image and saving the model."""


def train(task: Task) -> dict[str, Any]:
    """Train until the budget is used up; its own evaluation runs once, at the end, on one image."""
    time.monotonic = time.process_time  # before our modules are imported, which use time.monotonic
    importlib.import_module("m2f_trainer.training.run")
    folder = Path(task.folder, "run")
    left = task.minutes - (time.process_time() + STOPPING) / 60
    given = {
        "dataset_name": task.dataset,
        "backbone": task.backbone,
        "output_dir": folder,
        "overwrite_output_dir": "true",
        "seed": task.seed,
        "max_minutes": f"{left:.3f}",
        "checkpointing_steps": 10**6,
        "max_eval_samples": 1,
        "dataloader_num_workers": 0,  # the clock would not see the CPU time of worker processes
    }
    fixed = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    _m2f("train", *fixed, *task.settings["options"])
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    steps = state["global_step"]
    return {"images": steps * recipe["per_device_train_batch_size"], "steps": steps}


def predict(task: Task) -> list[dict[str, Any]]:
    """The predictions that `m2f evaluate` scored."""
    scored = Path(task.folder, "scored")
    _m2f("evaluate", str(Path(task.folder, "run")), task.dataset, "--output_dir", str(scored))
    results: list[dict[str, Any]] = json.loads((scored / "predictions.json").read_text(encoding="utf-8"))
    return results


def _m2f(*words: str) -> None:
    print("m2f", *words, flush=True)
    sys.argv = ["m2f", *words]
    try:
        runpy.run_module("m2f_trainer", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    serve(train, predict)
