"""The interface between benchmark and adapter. Standard library only, because it runs in every rival's environment."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TRAINED, PREDICTIONS = "trained.json", "predictions.json"


@dataclass(frozen=True)
class Task:
    """One training of one rival.

    The adapter writes into `folder`. `minutes` is the budget in CPU-minutes from the start of the process. `settings`
    are the rival's, from rivals.json. `backbone` is a folder of pretrained weights. `steps` is the number of steps that
    fit into the budget, for a rival whose schedule needs one; the other adapters measure their CPU time themselves.
    """

    dataset: str
    backbone: str
    folder: str
    minutes: float
    seed: int
    settings: dict[str, Any]
    steps: int | None = None

    def save(self) -> Path:
        """Write task.json into the folder; return its path."""
        path = Path(self.folder, "task.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    def annotations(self, split: str) -> dict[str, Any]:
        """The content of a split's annotation file."""
        content: dict[str, Any] = json.loads(annotation_file(self.dataset, split).read_text(encoding="utf-8"))
        return content

    def image(self, split: str, entry: dict[str, Any]) -> Path:
        """The image file of an entry of `images`."""
        return Path(self.dataset, split, entry["file_name"])


def annotation_file(dataset: str | Path, split: str) -> Path:
    """`DATASET/SPLIT/_annotations.coco.json`; the images are in the same folder."""
    return Path(dataset, split, "_annotations.coco.json")


def serve(train: Callable[[Task], dict[str, Any]], predict: Callable[[Task], list[dict[str, Any]]]) -> None:
    """Run an adapter's command line: `train TASK_FILE` or `predict TASK_FILE`.

    `train` trains within the budget, saves the model in the task's folder and returns facts for the report, among them
    `images`, the number of training images processed. `predict` returns COCO results for all validation images, with
    masks as RLE at original size.
    """
    phase, path = sys.argv[1:]
    task = Task(**json.loads(Path(path).read_text(encoding="utf-8")))
    name, written = (TRAINED, train(task)) if phase == "train" else (PREDICTIONS, predict(task))
    Path(task.folder, name).write_text(json.dumps(written) + "\n", encoding="utf-8")
