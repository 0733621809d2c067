"""Score the predictions of a rival with pycocotools: whole images at original size, original annotations."""

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
    """COCO mask AP, 0 to 1, of the `MOST` highest scores of each image over all classes; -1 if no object has that size.

    Raises:
        AssertionError: a result has an image id that is not in the annotations
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
