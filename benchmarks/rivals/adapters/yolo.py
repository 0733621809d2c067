"""Ultralytics' YOLO with random initial weights and its own defaults.

The budget is Ultralytics' option `time`. After each epoch it estimates how many epochs fit, sets the learning rate and
the end of mosaic accordingly, and stops when the time is used up. Its clock is replaced by CPU time. Its validation is
left out, as the budget excludes validation for all rivals, so the last weights (its moving average) are scored.
"""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.rivals.task import Task, serve

STOPPING = 1.0
"""CPU seconds reserved for saving the last weights."""


def _offline(task: Task) -> None:
    """Switch off downloads, telemetry and installation, and use one thread; call it before the package is imported."""
    config = Path(task.folder, "config")
    os.environ |= {"YOLO_CONFIG_DIR": str(config), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    (config / "Ultralytics").mkdir(parents=True, exist_ok=True)
    import matplotlib

    font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    for folder in (config, config / "Ultralytics"):  # Ultralytics downloads Arial if this file is missing
        shutil.copy(font, folder / "Arial.ttf")
    from ultralytics.utils import torch_utils

    torch_utils.NUM_THREADS = 1


def train(task: Task) -> dict[str, Any]:
    """Convert the data, then train until the budget is used up."""
    _offline(task)
    from ultralytics.engine import trainer as engine
    from ultralytics.models.yolo.segment import SegmentationTrainer

    engine.time = SimpleNamespace(time=time.process_time)
    seen = {"images": 0, "epochs": 0}

    class Trainer(SegmentationTrainer):
        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            seen["images"] += len(batch["img"])
            return super().preprocess_batch(batch)

        def validate(self) -> tuple[dict[str, float], float]:
            self.best_fitness = 0.0
            return {}, 0.0

        def final_eval(self) -> None:
            pass

    def start(trainer: Any) -> None:
        trainer.args.time = (60 * task.minutes - time.process_time() - STOPPING) / 3600
        if trainer.args.time <= 0:
            raise SystemExit(f"--minutes {task.minutes:g}: used up before the first step. Give more minutes.")

    trainer = Trainer(
        overrides={
            "model": task.settings["model"], "pretrained": False, "data": str(write_dataset(task)),
            "imgsz": task.settings["imgsz"], "time": task.minutes / 60, "seed": task.seed, "device": "cpu",
            "amp": False, "plots": False, "val": False, "project": task.folder, "name": "run", "exist_ok": True,
            **task.settings.get("options", {}),
        }
    )  # fmt: skip
    trainer.add_callback("on_train_start", start)
    trainer.train()
    return {
        **seen,
        "epochs": trainer.epoch + 1,
        "planned_epochs": trainer.epochs,
        "learning_rate": trainer.lr["lr/pg0"],
    }


def write_dataset(task: Task) -> Path:
    """Write the dataset for YOLO: images as links, one polygon for each object, parts joined by Ultralytics' own
    function.
    """
    import numpy as np
    from ultralytics.data.converter import merge_multi_segment

    folder = Path(task.folder, "data").absolute()
    categories = sorted(task.annotations("train")["categories"], key=lambda one: one["id"])
    classes = {one["id"]: k for k, one in enumerate(categories)}
    for split in ("train", "valid"):
        annotations = task.annotations(split)
        lines: dict[int, list[str]] = {image["id"]: [] for image in annotations["images"]}
        sizes = {image["id"]: (image["width"], image["height"]) for image in annotations["images"]}
        for one in annotations["annotations"]:
            parts = [part for part in outlines(one["segmentation"]) if len(part) > 2]
            if one.get("iscrowd") or not parts:
                continue
            joined = parts[0] if len(parts) == 1 else np.concatenate(merge_multi_segment(parts))
            shares = (joined / np.array(sizes[one["image_id"]])).clip(0, 1).reshape(-1)
            lines[one["image_id"]].append(f"{classes[one['category_id']]} {' '.join(f'{x:.6f}' for x in shares)}")
        for kind in ("images", "labels"):
            shutil.rmtree(folder / kind / split, ignore_errors=True)
            (folder / kind / split).mkdir(parents=True)
        for image in annotations["images"]:
            source = task.image(split, image).absolute()
            name = f"{image['id']:012d}"
            (folder / "images" / split / f"{name}{source.suffix}").symlink_to(source)
            (folder / "labels" / split / f"{name}.txt").write_text("\n".join(lines[image["id"]]))
    names = {k: one["name"] for k, one in enumerate(categories)}
    described = {"path": str(folder), "train": "images/train", "val": "images/valid", "names": names}
    (folder / "data.yaml").write_text(json.dumps(described))  # JSON is YAML
    return folder / "data.yaml"


def outlines(segmentation: Any) -> list[Any]:
    """Outlines (points, 2) in pixels of a segmentation in polygons or RLE."""
    import cv2
    import numpy as np
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        return [np.array(part, dtype=np.float64).reshape(-1, 2) for part in segmentation]
    rle = segmentation
    if isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, *rle["size"])
    found, _ = cv2.findContours(coco_mask.decode(rle), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [contour.reshape(-1, 2).astype(np.float64) for contour in found]


def predict(task: Task) -> list[dict[str, Any]]:
    """Ultralytics' `predict`: masks at original size, scores from 0.001."""
    _offline(task)
    import numpy as np
    from pycocotools import mask as coco_mask
    from ultralytics import YOLO

    ids = [one["id"] for one in sorted(task.annotations("train")["categories"], key=lambda one: one["id"])]
    model = YOLO(Path(task.folder, "run", "weights", "last.pt"))
    results = []
    for image in task.annotations("valid")["images"]:
        (found,) = model.predict(
            str(task.image("valid", image)), imgsz=task.settings["imgsz"], conf=0.001, max_det=100, retina_masks=True,
            device="cpu", verbose=False, save=False,
        )  # fmt: skip
        for k in range(len(found.boxes)):
            mask = np.asfortranarray(found.masks.data[k].numpy() > 0.5, dtype=np.uint8)
            rle = coco_mask.encode(mask)
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": ids[int(found.boxes.cls[k])],
                    "score": float(found.boxes.conf[k]),
                    "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
                }
            )
    return results


if __name__ == "__main__":
    serve(train, predict)
