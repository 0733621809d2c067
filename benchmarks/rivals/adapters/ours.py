"""Our own command line, as a user would type it: `m2f train --dataset_name X --max_minutes M`, then `m2f evaluate`.

There is no recipe: the command chooses the settings for the dataset and this machine. Only the backbone is given, as a
folder, because no Hub can be reached where the benchmark was made. The budget is our own option `max_minutes`, which
plans the learning rate for the time and ends the run with it. Its clock is put on CPU time.
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
"""CPU seconds kept for evaluating one image and writing the model."""


def train(task: Task) -> dict[str, Any]:
    """Train until the CPU-minutes are over; its own evaluation is of one image, once, at the end."""
    time.monotonic = time.process_time  # before anything of ours is imported and takes the other
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
        "dataloader_num_workers": 0,  # whose CPU time the clock would not see
    }
    fixed = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    _m2f("train", *fixed, *task.settings["options"])
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    steps = state["global_step"]
    return {"images": steps * recipe["per_device_train_batch_size"], "steps": steps}


def predict(task: Task) -> list[dict[str, Any]]:
    """The predictions that its evaluation scores."""
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
