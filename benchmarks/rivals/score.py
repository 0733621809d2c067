"""The one score of all rivals: pycocotools on whole images at original size against untouched annotations."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

MOST = 100
FIGURES = ("AP", "AP50", "AP75", "small", "medium", "large")


def score(annotations: Path, results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """COCO mask AP of results, 0 to 1; each image's best `MOST` results count, whatever their class.

    -1 where there is no object of that size.

    Raises:
        AssertionError: a result names an image that the annotations don't have
    """
    with redirect_stdout(StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, _results(truth, _best(results)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(FIGURES, map(float, evaluation.stats), strict=False))


def _best(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    of_image = defaultdict(list)
    for one in results:
        of_image[one["image_id"]].append(one)
    return [one for found in of_image.values() for one in sorted(found, key=lambda one: -one["score"])[:MOST]]


def _results(truth: COCO, results: list[dict[str, Any]]) -> COCO:
    if results:
        return truth.loadRes(results)
    empty = COCO()  # loadRes can't read an empty list
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty
