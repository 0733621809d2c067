"""The `evaluate` metric returns the metrics of `CocoMap`."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.evaluation.evaluate_metric import CocoMapMetric
from tests.evaluation.truth import categories_in, rows_of, synthetic


@pytest.fixture
def predicted(tmp_path: Path):  # type: ignore[no-untyped-def]
    coco, predictions = synthetic(7, seed=20)
    rows, categories = rows_of(coco), categories_in(coco)
    return CocoMapMetric(rows, categories, cache_dir=str(tmp_path)), CocoMap(rows, categories), predictions


def test_batches_give_the_metrics_of_coco_map(predicted) -> None:  # type: ignore[no-untyped-def]
    metric, scorer, predictions = predicted
    metric.add_batch(predictions=predictions[:4])
    metric.add(prediction=predictions[4])
    metric.add_batch(predictions=predictions[5:])
    assert metric.compute() == scorer(predictions)


def test_all_predictions_at_once_give_the_metrics_of_coco_map_every_time(predicted) -> None:  # type: ignore[no-untyped-def]
    metric, scorer, predictions = predicted
    assert metric.compute(predictions=predictions) == scorer(predictions)
    assert metric.compute(predictions=predictions[:2]) == scorer(predictions[:2])
