"""All metrics and diagnostics for one split.

The metrics (COCO AP and AR, boundary AP) are numbers by name, logged at each evaluation. The diagnostics are written to
evaluation.json, next to a checkpoint's metrics.json. Reports, model cards and pictures are made from them.

The metrics count the 100 best predictions of an image, as the original Mask2Former's do; COCO's own limit is 100 of
each class. Where images have more objects than that, no model can find them all by these figures, so AP is given
without the limit, too. The diagnostics count all predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from m2f_trainer.data.dataset import Category
from m2f_trainer.evaluation.coco import IOU_50, IOU_75, LIMITS, CocoMap, mean_of_present
from m2f_trainer.evaluation.matching import average_precisions, concatenate_matches, match_image
from m2f_trainer.evaluation.overlaps import ImageOverlaps, image_overlaps
from m2f_trainer.evaluation.thresholds import (
    ThresholdStats,
    above_threshold,
    best_thresholds,
    calibration,
    confusion_counts,
    image_quality,
)
from m2f_trainer.evaluation.tide import ImageErrors, classify_predictions, collect_predictions, tide_errors
from m2f_trainer.inference.instances import Instances

EXAMPLES = 6  # maximum number of worst images, and of best images, whose predictions are kept


class Evaluator:
    """Scores predictions against one split: `metrics = evaluator(instances)`, then `evaluator.details`.

    Args:
        dataset: rows of `load_coco`.
        categories: the scored categories. Default: those of the dataset.

    Attributes:
        dense: whether an image has more than 100 objects.
        details: the content of evaluation.json for the latest call; empty before the first.
    """

    def __init__(self, dataset: Dataset, categories: Sequence[Category] | None = None) -> None:
        self.coco = CocoMap(dataset, categories)
        objects = map(self.coco.objects, self.coco.sizes)
        self.dense = any(sum(not one["iscrowd"] for one in several) > LIMITS[-1] for several in objects)
        self.details: dict[str, Any] = {}

    def __call__(self, instances: Iterable[Instances]) -> dict[str, float]:
        """The metrics of `CocoMap` and `boundary_map`, `boundary_map_50`, ... of the 100 best predictions of an image.

        If the split is `dense`, `unlimited_map`, `unlimited_map_50`, ... of all predictions are added. Raises DataError
        as `CocoMap` does.
        """
        predictions = list(instances)
        names = self.coco.class_names()
        best = [one.best(LIMITS[-1]) for one in predictions]
        figures, precision = self.coco.score(best)
        overlaps = list(image_overlaps(self.coco, predictions))
        all_count = all(len(one) <= LIMITS[-1] for one in predictions)
        limited = overlaps if all_count else image_overlaps(self.coco, best)
        matches = (match_image(image, len(names), "boundaries") for image in limited)
        figures |= average_precisions(concatenate_matches(matches, len(names)), names, "boundary_")
        if self.dense:
            matches = (match_image(image, len(names), limit=None) for image in overlaps)
            figures |= average_precisions(concatenate_matches(matches, len(names)), names, "unlimited_")
        self.details = evaluation_details(overlaps, predictions, self.coco, precision) | {"figures": figures}
        return figures


def evaluation_details(
    overlaps: Sequence[ImageOverlaps],
    predictions: Sequence[Instances],
    coco: CocoMap,
    precision: NDArray[np.float64],
) -> dict[str, Any]:
    """The content of evaluation.json except the metrics. Class k is row k of its `classes`.

    Args:
        overlaps: one entry per image of the split.
        precision: (10, 101, K, 4, 3), as in pycocotools: IoU thresholds, recalls, classes, area ranges, limits.
    """
    errors = [classify_predictions(image) for image in overlaps]
    scored = collect_predictions(overlaps, errors, len(coco.categories))
    thresholds = best_thresholds(scored)
    images = [
        image_quality(image, image_errors, above_threshold(image, thresholds))
        for image, image_errors in zip(overlaps, errors, strict=True)
    ]
    return {
        "classes": class_rows(coco, precision, thresholds),
        "precision_recall": curves(precision),
        "errors": tide_errors(scored),
        "calibration": calibration(scored),
        "confusion": confusion_table(overlaps, errors, thresholds),
        "images": images,
        "shown": select_examples(images, predictions, coco, thresholds),
    }


def class_rows(
    coco: CocoMap, precision: NDArray[np.float64], thresholds: Sequence[ThresholdStats]
) -> list[dict[str, Any]]:
    """One row per class: id, name, AP, AP50, AP75, and the values of `ThresholdStats`."""
    return [
        {
            "id": category.id,
            "name": name,
            "ap": mean_of_present(precision[:, :, index, 0, -1]),
            "ap50": mean_of_present(precision[IOU_50, :, index, 0, -1]),
            "ap75": mean_of_present(precision[IOU_75, :, index, 0, -1]),
            **vars(thresholds[index]),
        }
        for index, (category, name) in enumerate(zip(coco.categories, coco.class_names(), strict=True))
    ]


def curves(precision: NDArray[np.float64]) -> dict[str, Any]:
    """Precision at recalls 0, 0.01, ..., 1: the mean over classes at IoU 0.5, 0.75 and 0.9, and each class at 0.5.

    A class without objects has None.
    """
    whole = precision[:, :, :, 0, -1]  # (10, 101, K)
    present = whole[0, 0] > -1
    mean = {name: whole[place][:, present] for name, place in (("0.5", IOU_50), ("0.75", IOU_75), ("0.9", 8))}
    return {
        "mean": {name: values.mean(axis=1).round(4).tolist() if present.any() else [] for name, values in mean.items()},
        "classes": [
            whole[IOU_50, :, index].round(4).tolist() if there else None for index, there in enumerate(present)
        ],
    }


def confusion_table(
    overlaps: Sequence[ImageOverlaps], errors: Sequence[ImageErrors], thresholds: Sequence[ThresholdStats]
) -> list[list[int]]:
    """Non-zero cells of the confusion matrix, [object's class, predicted class, count]; -1 is the background."""
    total: Counter[tuple[int, int]] = Counter()
    for image, image_errors in zip(overlaps, errors, strict=True):
        total.update(confusion_counts(image, image_errors, above_threshold(image, thresholds)))
    return [[*pair, count] for pair, count in sorted(total.items())]


def select_examples(
    images: Sequence[Mapping[str, Any]],
    predictions: Sequence[Instances],
    coco: CocoMap,
    thresholds: Sequence[ThresholdStats],
) -> dict[str, list[dict[str, Any]]]:
    """The worst and the best images, each with its predictions at or above the threshold of their class.

    Images without objects and without such predictions are left out.
    """
    nonempty = [one for one in images if one["found"] + one["wrong"] + one["missed"]]
    ranked = sorted(nonempty, key=lambda one: (one["quality"], -one["wrong"] - one["missed"], -one["found"]))
    worst = ranked[: min(EXAMPLES, (len(ranked) + 1) // 2)]
    best = ranked[len(worst) :][::-1][:EXAMPLES]
    lowest = {c.id: one.threshold for c, one in zip(coco.categories, thresholds, strict=True) if one.kept}
    by_image = coco.by_image(predictions)
    return {
        kind: [{**one, "predictions": kept_results(by_image.get(one["image_id"]), lowest)} for one in ones]
        for kind, ones in (("worst", worst), ("best", best))
    }


def kept_results(predictions: Instances | None, lowest: Mapping[int, float]) -> list[dict[str, Any]]:
    """COCO results of one image whose score is at least the `lowest` of their category id; others are left out."""
    results = predictions.to_coco() if predictions is not None else []
    return [one for one in results if one["score"] >= lowest.get(one["category_id"], 2.0)]
