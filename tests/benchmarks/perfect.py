"""A rival for the tests that returns the annotations of the validation split as its predictions."""

import sys
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from benchmarks.rivals.task import Task, annotation_file, serve


def train(task: Task) -> dict[str, Any]:
    """Record the call in trainings.txt."""
    with Path(task.folder, "trainings.txt").open("a", encoding="utf-8") as file:
        file.write(f"{task.minutes:g} {task.seed} {task.steps}\n")
    if task.settings.get("fails"):
        sys.exit("no more memory")
    return {"images": 7}


def predict(task: Task) -> list[dict[str, Any]]:
    """The annotations as COCO results."""
    truth = COCO(str(annotation_file(task.dataset, "valid")))
    results = []
    for one in truth.anns.values():
        rle = truth.annToRLE(one)
        mask = {"size": rle["size"], "counts": rle["counts"].decode()}
        results.append(
            {"image_id": one["image_id"], "category_id": one["category_id"], "score": 1.0, "segmentation": mask}
        )
    return results


if __name__ == "__main__":
    serve(train, predict)
