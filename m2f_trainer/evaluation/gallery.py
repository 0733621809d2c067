"""Pictures of ground truth and prediction side by side, for reports, model cards and loggers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from m2f_trainer.data.dataset import Category
from m2f_trainer.data.hub_dataset import load_recipe_dataset
from m2f_trainer.data.transforms import read_image
from m2f_trainer.errors import DataError, ImageError
from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.run_folder import PICTURES, Run
from m2f_trainer.viz.overlay import add_legend, labels_fit, save_image

GAP = 6  # pixels between the two images
SHOWN_PICTURES, PICTURE_SIDE = 3, 480  # of the worst and of the best images each; pixels of the longer side
PICTURE = re.compile(rf"{PICTURES}/(worst|best)_\d\.jpg")
"""Paths of `draw_pictures` in a folder."""


def rows_of_run(run: Run) -> Dataset | None:
    """The valid split that the run was scored on; None if its dataset can't be loaded on this machine."""
    if not run.recipe.get("dataset_name"):
        return None
    try:
        return load_recipe_dataset(run.recipe).get("valid")
    except (DataError, OSError):
        return None


def ground_truth(row: Mapping[str, Any]) -> Instances:
    """The objects of a dataset row, without crowd regions, as Instances whose scores are NaN."""
    objects = [item for item in row["objects"] if not item["iscrowd"]]
    size = (int(row["height"]), int(row["width"]))
    rles = [{"size": list(size), "counts": item["counts"].encode("ascii")} for item in objects]
    ids = np.array([item["category_id"] for item in objects], np.int64)
    return Instances(int(row["image_id"]), ids, np.full(len(rles), np.nan), rles, tight_boxes(rles), size)


def side_by_side(
    row: Mapping[str, Any], found: Instances | None, names: Mapping[int, str], longest: int
) -> Image.Image:
    """The image of a row twice, ground truth on the left and prediction on the right, with one legend below both.

    Both have labels, or neither, so that a colour means the same on both sides.

    Args:
        found: the prediction; None draws nothing on the right.
        names: category id -> name.
        longest: maximum length of the longer side of each image in pixels.

    Raises:
        ImageError: the image can't be read, or is no longer of the size that was predicted.
    """
    where, truth = f"image {row['image_id']}", ground_truth(row)
    image = read_image(row)
    if found is not None and found.size != truth.size:
        raise ImageError(
            f"{where}: predicted at {found.size[1]}x{found.size[0]} pixels, and now has {image.width}x{image.height}:"
            " the dataset has changed since. Score the model again."
        )
    halves = (truth, truth.best(0) if found is None else found)
    names = {int(one): str(one) for half in halves for one in half.category_ids} | dict(names)  # so colours agree
    labelled = all(labels_fit(half.size, half.boxes, half.category_ids.tolist(), names) for half in halves)
    (left, legend), (right, right_legend) = (half.drawn_on(image, names, labelled=labelled) for half in halves)
    left.thumbnail((longest, longest))
    right.thumbnail((longest, longest))
    both = Image.new("RGB", (2 * left.width + GAP, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    return add_legend(both, {**legend, **right_legend})


def rows_by_id(dataset: Dataset, image_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The rows of these images, by image id; an id that the dataset lacks is left out."""
    places = {int(image_id): place for place, image_id in enumerate(dataset["image_id"])}
    return {one: dataset[places[one]] for one in image_ids if one in places}


def pictures(
    dataset: Dataset, shown: Sequence[Mapping[str, Any]], categories: Sequence[Category], longest: int = 480
) -> list[tuple[str, Image.Image, Mapping[str, Any]]]:
    """(file name, ground truth beside prediction, entry) of each entry of evaluation.json's `shown`."""
    names = {category.id: category.name for category in categories}
    rows = rows_by_id(dataset, [one["image_id"] for one in shown])
    made = []
    for one in shown:
        if row := rows.get(one["image_id"]):
            found = next(iter(Instances.from_coco(one["predictions"])), None)
            name = str(row["image"].get("path") or one["image_id"]).replace("\\", "/").rsplit("/", 1)[-1]
            made.append((name, side_by_side(row, found, names, longest), one))
    return made


def draw_pictures(folder: Path, dataset: Dataset, details: Mapping[str, Any]) -> list[Path]:
    """Write the worst and the best images, ground truth beside prediction, into the folder's `pictures/`.

    Pictures of an earlier evaluation are removed. Returns the paths written. Raises ImageError where an image can't be
    read.
    """
    categories = [Category(row["id"], row["name"]) for row in details.get("classes", [])]
    written = []
    for kind, entries in details.get("shown", {}).items():
        for number, (_, image, _) in enumerate(
            pictures(dataset, entries[:SHOWN_PICTURES], categories, PICTURE_SIDE), 1
        ):
            written.append(save_image(image, folder / PICTURES / f"{kind}_{number}.jpg", quality=85))
    for path in (folder / PICTURES).glob("*.jpg"):
        if PICTURE.fullmatch(f"{PICTURES}/{path.name}") and path not in written:
            path.unlink()
    return written
