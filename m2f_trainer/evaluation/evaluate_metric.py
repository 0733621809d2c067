"""The COCO metrics as a metric of the `evaluate` library; a separate file because importing it takes seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from m2f_trainer.data.dataset import Category
from m2f_trainer.evaluation.coco import CocoMap, Engine
from m2f_trainer.inference.instances import Instances, tight_boxes


class CocoMapMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """`CocoMap` with the interface of `evaluate`: `add_batch(predictions=[Instances, ...])`, then `compute()`.

    Args:
        dataset: rows of `load_coco`.
        categories, engine: as for `CocoMap`.
        settings: passed to `evaluate.Metric`, for example `num_process`, `process_id` and `experiment_id`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        categories: Sequence[Category] | None = None,
        *,
        engine: Engine = "auto",
        **settings: Any,
    ) -> None:
        self._scorer = CocoMap(dataset, categories, engine=engine)
        super().__init__(**settings)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value
        row = {
            "image_id": value("int64"),
            "size": datasets.List(value("int64")),
            "category_ids": datasets.List(value("int64")),
            "scores": datasets.List(value("float64")),
            "counts": datasets.List(value("string")),
        }
        return evaluate.MetricInfo(
            description="Official COCO mask and box average precision of instance segmentation.",
            citation="Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014.",
            inputs_description="predictions: a list of m2f_trainer Instances, one per image.",
            features=datasets.Features({"predictions": row}),
        )

    def add_batch(self, *, predictions: Sequence[Instances], **_: Any) -> None:
        """Add the predictions of several images; the ground truth comes from the dataset."""
        super().add_batch(predictions=[_to_row(item) for item in predictions])

    def add(self, *, prediction: Instances, **_: Any) -> None:
        """Add the predictions of one image."""
        self.add_batch(predictions=[prediction])

    def compute(self, *, predictions: Sequence[Instances] | None = None, **_: Any) -> dict[str, float] | None:
        """The metrics of `CocoMap` over all added predictions; None on every process except the first."""
        if predictions is not None:
            self.add_batch(predictions=predictions)
        metrics: dict[str, float] | None = super().compute()
        return metrics

    def _compute(self, *, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return self._scorer(_from_row(row) for row in predictions)


def _to_row(item: Instances) -> dict[str, Any]:
    return {
        "image_id": item.image_id,
        "size": list(item.size),
        "category_ids": item.category_ids.tolist(),
        "scores": item.scores.tolist(),
        "counts": [rle["counts"].decode("ascii") for rle in item.rles],
    }


def _from_row(row: Mapping[str, Any]) -> Instances:
    size = (int(row["size"][0]), int(row["size"][1]))
    rles = [{"size": list(size), "counts": counts.encode("ascii")} for counts in row["counts"]]
    scores = np.asarray(row["scores"], np.float64)
    category_ids = np.asarray(row["category_ids"], np.int64)
    return Instances(int(row["image_id"]), category_ids, scores, rles, tight_boxes(rles), size)
