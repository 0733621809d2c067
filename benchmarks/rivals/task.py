"""One training of one rival, as its adapter gets it. Standard library only: it is read in every rival's environment."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TRAINED, PREDICTIONS = "trained.json", "predictions.json"


@dataclass(frozen=True)
class Task:
    """`folder` is where the adapter writes; `minutes` is the budget in CPU-minutes, the process's start included.

    `settings` are the rival's own, from rivals.json. `backbone` is a folder of pretrained weights. `steps` is how many
    steps fit into the budget, for a rival whose schedule is given in steps; others look at the clock themselves.
    """

    dataset: str
    backbone: str
    folder: str
    minutes: float
    seed: int
    settings: dict[str, Any]
    steps: int | None = None

    def save(self) -> Path:
        """Write it into its folder; return the file."""
        path = Path(self.folder, "task.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    def annotations(self, split: str) -> dict[str, Any]:
        """The split's COCO file as it is."""
        content: dict[str, Any] = json.loads(annotation_file(self.dataset, split).read_text(encoding="utf-8"))
        return content

    def image(self, split: str, entry: dict[str, Any]) -> Path:
        """The file of an entry of `images`."""
        return Path(self.dataset, split, entry["file_name"])


def annotation_file(dataset: str | Path, split: str) -> Path:
    """Where a split's annotations lie: `DATASET/SPLIT/_annotations.coco.json`, images beside it."""
    return Path(dataset, split, "_annotations.coco.json")


def serve(train: Callable[[Task], dict[str, Any]], predict: Callable[[Task], list[dict[str, Any]]]) -> None:
    """An adapter's command line: `train TASK_FILE` or `predict TASK_FILE`.

    `train` trains within the budget, leaves the model in the task's folder and returns facts to be reported (`images`:
    how many training images it saw). `predict` returns COCO results of the whole validation images, masks as run
    lengths at original size.
    """
    phase, path = sys.argv[1:]
    task = Task(**json.loads(Path(path).read_text(encoding="utf-8")))
    name, written = (TRAINED, train(task)) if phase == "train" else (PREDICTIONS, predict(task))
    Path(task.folder, name).write_text(json.dumps(written) + "\n", encoding="utf-8")
