"""Overfit eight real photos: python -m benchmarks.accuracy.overfit_eight COCO_FOLDER OUT [--field value ...]

Takes the eight images of the train split whose smallest object is largest (no crowd regions, at least one object), uses
them as both train and valid split, and trains with overfit_eight.json. A pipeline that loses, shifts or confuses
objects between annotation and score can't reach an AP near 1.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.training.run import train

ANNOTATIONS = "_annotations.coco.json"


def largest_objects(annotations: dict[str, Any], count: int) -> list[int]:
    """Ids of the images whose smallest object takes the largest share of the image."""
    smallest: dict[int, float] = {}
    area = {image["id"]: image["height"] * image["width"] for image in annotations["images"]}
    for entry in annotations["annotations"]:
        share = 0.0 if entry["iscrowd"] else entry["area"] / area[entry["image_id"]]
        smallest[entry["image_id"]] = min(smallest.get(entry["image_id"], 1.0), share)
    return sorted(smallest, key=lambda key: -smallest[key])[:count]


def write_subset(source: Path, target: Path, count: int = 8) -> None:
    """Write the chosen images as train and as valid split."""
    annotations = json.loads((source / "train" / ANNOTATIONS).read_text(encoding="utf-8"))
    chosen = set(largest_objects(annotations, count))
    images = [image for image in annotations["images"] if image["id"] in chosen]
    objects = [entry for entry in annotations["annotations"] if entry["image_id"] in chosen]
    for split in ("train", "valid"):
        (target / split).mkdir(parents=True, exist_ok=True)
        subset = {"images": images, "annotations": objects, "categories": annotations["categories"]}
        (target / split / ANNOTATIONS).write_text(json.dumps(subset), encoding="utf-8")
        for image in images:
            shutil.copy(source / "train" / image["file_name"], target / split)


def main() -> None:
    source, out, options = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    write_subset(source, out / "data")
    recipe = str(Path(__file__).with_suffix(".json"))
    given = ["--dataset_name", str(out / "data"), "--output_dir", str(out / "run"), *options]
    print(f"mask AP on the eight images: {train(load_recipe([recipe, *given]))['eval_map']:.3f}")


if __name__ == "__main__":
    main()
