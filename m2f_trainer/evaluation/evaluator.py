"""All that is said of a model's predictions on a split: the figures, and the details behind them.

The figures (COCO's, and boundary AP) are numbers by name, logged at each evaluation. The details go into
evaluation.json, beside a checkpoint's metrics.json: what reports, cards and pictures are made from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from m2f_trainer.data.dataset import Category
from m2f_trainer.evaluation.coco import IOU_50, IOU_75, CocoMap, mean_of_present
from m2f_trainer.evaluation.matching import boundary_figures, joined, match_scene
from m2f_trainer.evaluation.overlaps import Scene, scenes
from m2f_trainer.evaluation.thresholds import Operation, calibration, confusion, image_quality, kept_of, operations
from m2f_trainer.evaluation.tide import Verdict, breakdown, gather, judge
from m2f_trainer.inference.instances import Instances

SHOWN = 6  # images kept with their predictions: so many of the worst, and of the best


class Assessment:
    """Scores predictions against one split: `figures = assessment(instances)`, then `assessment.details`.

    Args:
        dataset: rows of `load_coco`.
        categories: the scored categories; those of the dataset unless given.
    """

    def __init__(self, dataset: Dataset, categories: Sequence[Category] | None = None) -> None:
        self.coco = CocoMap(dataset, categories)
        self.details: dict[str, Any] = {}

    def __call__(self, instances: Iterable[Instances]) -> dict[str, float]:
        """`CocoMap`'s figures and `boundary_map`, `boundary_map_50`, ... Raises DataError as `CocoMap`."""
        found = list(instances)
        names = self.coco.class_names()
        figures, precision = self.coco.score(found)
        seen = list(scenes(self.coco, found))
        figures |= boundary_figures(
            joined((match_scene(one, len(names), "boundaries") for one in seen), len(names)), names
        )
        self.details = details(seen, found, self.coco, precision) | {"figures": figures}
        return figures


def details(
    seen: Sequence[Scene], found: Sequence[Instances], coco: CocoMap, precision: NDArray[np.float64]
) -> dict[str, Any]:
    """What evaluation.json holds besides the figures; classes are numbered as in its `classes`.

    `precision` is (10, 101, K, 4, 3), as pycocotools has it.
    """
    verdicts = [judge(scene) for scene in seen]
    points = gather(seen, verdicts, len(coco.categories))
    chosen = operations(points)
    images = [image_quality(one, verdict, kept_of(one, chosen)) for one, verdict in zip(seen, verdicts, strict=True)]
    return {
        "classes": classes_table(coco, precision, chosen),
        "precision_recall": curves(precision),
        "errors": breakdown(points),
        "calibration": calibration(points),
        "confusion": confusion_table(seen, verdicts, chosen),
        "images": images,
        "shown": shown(images, found, coco, chosen),
    }


def classes_table(coco: CocoMap, precision: NDArray[np.float64], chosen: Sequence[Operation]) -> list[dict[str, Any]]:
    """One row a class: its name and id, AP, AP50, and how it does at its best threshold."""
    return [
        {
            "id": category.id,
            "name": name,
            "ap": mean_of_present(precision[:, :, index, 0, -1]),
            "ap50": mean_of_present(precision[IOU_50, :, index, 0, -1]),
            "ap75": mean_of_present(precision[IOU_75, :, index, 0, -1]),
            **vars(chosen[index]),
        }
        for index, (category, name) in enumerate(zip(coco.categories, coco.class_names(), strict=True))
    ]


def curves(precision: NDArray[np.float64]) -> dict[str, Any]:
    """Precision at the recalls 0, 0.01, ..., 1, the classes' mean at three IoUs and each class at 0.5."""
    whole = precision[:, :, :, 0, -1]  # (10, 101, K)
    present = whole[0, 0] > -1
    mean = {name: whole[place][:, present] for name, place in (("0.5", IOU_50), ("0.75", IOU_75), ("0.9", 8))}
    return {
        "mean": {name: values.mean(axis=1).round(4).tolist() if present.any() else [] for name, values in mean.items()},
        "classes": [
            whole[IOU_50, :, index].round(4).tolist() if there else None for index, there in enumerate(present)
        ],
    }


def confusion_table(seen: Sequence[Scene], verdicts: Sequence[Verdict], chosen: Sequence[Operation]) -> list[list[int]]:
    """[class of the object, predicted class, how often], -1 being the background, where there is any."""
    total: Counter[tuple[int, int]] = Counter()
    for scene, verdict in zip(seen, verdicts, strict=True):
        total.update(confusion(scene, verdict, kept_of(scene, chosen)))
    return [[*pair, count] for pair, count in sorted(total.items())]


def shown(
    images: Sequence[Mapping[str, Any]], found: Sequence[Instances], coco: CocoMap, chosen: Sequence[Operation]
) -> dict[str, list[dict[str, Any]]]:
    """The worst and the best images that have something in them, each with its predictions that reach the threshold."""
    busy = [one for one in images if one["found"] + one["wrong"] + one["missed"]]
    ranked = sorted(busy, key=lambda one: (one["quality"], -one["wrong"] - one["missed"], -one["found"]))
    worst = ranked[: min(SHOWN, (len(ranked) + 1) // 2)]
    best = ranked[len(worst) :][::-1][:SHOWN]
    least = {c.id: one.threshold for c, one in zip(coco.categories, chosen, strict=True) if one.kept}
    by_image = coco.by_image(found)
    return {
        kind: [{**one, "predictions": kept_results(by_image.get(one["image_id"]), least)} for one in ones]
        for kind, ones in (("worst", worst), ("best", best))
    }


def kept_results(found: Instances | None, least: Mapping[int, float]) -> list[dict[str, Any]]:
    """The COCO results of one image that reach the least score of their category."""
    results = found.to_coco() if found is not None else []
    return [one for one in results if one["score"] >= least.get(one["category_id"], 2.0)]
