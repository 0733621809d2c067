"""The official COCO mask and box metrics of predicted Instances.

The ground truth is taken unchanged from the annotation file: every object, crowd regions as ignore regions, areas as
given. Two engines compute the same precision and recall arrays: hotcoco if it is installed, otherwise pycocotools. The
metrics are computed here from those arrays, as in pycocotools' summary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from m2f_trainer.data.dataset import Category, categories_of
from m2f_trainer.data.problems import label_text
from m2f_trainer.errors import DataError
from m2f_trainer.inference.instances import Instances

COLUMNS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
TITLES = ("AP", "AP50", "AP75", "small", "medium", "large", "AR100")
CLASS_KEY = "map_class/"


def metrics_table(metrics: Mapping[str, float], prefix: str = "") -> str:
    """A text table of the metrics of an `Evaluator` in percent, then mask AP per class, best first.

    The rows are masks, boxes, boundaries and, where they were scored, masks without COCO's limit of 100 predictions.
    "-" marks a metric without any objects to score (-1 in the metrics).

    Args:
        metrics: what `CocoMap` returns, with `prefix` before each key.
        prefix: "eval_" for the Trainer's metrics.
    """
    lines = [f"{'':8}" + "".join(f"{title:>8}" for title in TITLES)]
    optional = {"boundary": "boundary_", "no limit": "unlimited_"}
    scored = {label: kind for label, kind in optional.items() if f"{prefix}{kind}map" in metrics}
    for label, kind in {"masks": "", "boxes": "box_", **scored}.items():
        values = [metrics.get(f"{prefix}{kind}{column}", -1.0) for column in COLUMNS]
        lines.append(f"{label:8}" + "".join(f"{percent(value):>8}" for value in values))
    if "no limit" in scored:
        counted = f"The other rows count the {LIMITS[-1]} best of an image, and some have more objects."
        lines += ["", f"no limit: masks, all predictions. {counted}"]
    start = prefix + CLASS_KEY
    classes = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
    width = max(len(label_text(name)) for name in ("class", *classes)) + 2
    if classes:
        lines += ["", f"{'class':{width}}{'AP':>8}"]
    ranked = sorted(classes.items(), key=lambda item: -item[1])
    return "\n".join(lines + [f"{label_text(name):{width}}{percent(value):>8}" for name, value in ranked])


def percent(value: float | None) -> str:
    """Format a share as percent; "-" if it was not scored (None) or there are no objects to score (-1)."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


Engine = Literal["auto", "hotcoco", "pycocotools"]
Kind = Literal["segm", "bbox"]
Results = list[dict[str, Any]] | NDArray[np.float64]
Chunk = tuple[list[dict[str, Any]], list[dict[str, Any]], Results]
"""Images, annotations and results in COCO format; box results as pycocotools' array with seven columns."""
Arrays = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Precision (10 IoU thresholds, 101 recalls, K, 4 area ranges, 3 limits), recall (10, K, 4, 3); -1 without objects."""

IOU_50, IOU_75 = 0, 5
AREAS = ("", "_small", "_medium", "_large")
LIMITS = (1, 10, 100)
IMAGES_AT_ONCE = 64


class CocoMap:
    """Scores predictions against one split: `CocoMap(dataset)(instances)`.

    Args:
        dataset: rows of `load_coco`.
        categories: the scored categories. Default: those of the dataset.
        engine: "auto" uses hotcoco if it is installed, otherwise pycocotools.
    """

    def __init__(
        self, dataset: Dataset, categories: Sequence[Category] | None = None, *, engine: Engine = "auto"
    ) -> None:
        chosen = categories_of(dataset) if categories is None else categories
        self.categories = tuple(sorted(chosen, key=lambda category: category.id))
        self.engine = (
            ("hotcoco" if importlib.util.find_spec("hotcoco") else "pycocotools") if engine == "auto" else engine
        )
        columns = dataset.select_columns(["image_id", "height", "width", "objects"]).with_format(None)
        rows = sorted(columns, key=lambda row: int(row["image_id"]))
        self.sizes = {int(row["image_id"]): (int(row["height"]), int(row["width"])) for row in rows}
        self._numbers = {image_id: number for number, image_id in enumerate(self.sizes, 1)}
        self._classes = {category.id: number for number, category in enumerate(self.categories, 1)}
        self._truth = [self._objects_of(row) for row in rows]

    def _objects_of(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The ground truth of one row. Images are renumbered by ascending id because hotcoco rejects negative ids."""
        return [
            {
                "image_id": self._numbers[row["image_id"]],
                "category_id": item["category_id"],
                "segmentation": {"size": [row["height"], row["width"]], "counts": item["counts"]},
                "bbox": list(item["bbox"]),
                "area": item["area"],
                "iscrowd": int(item["iscrowd"]),
            }
            for item in row["objects"]
            if item["category_id"] in self._classes
        ]

    def __call__(self, instances: Iterable[Instances]) -> dict[str, float]:
        """COCO's twelve metrics for masks, for boxes with the prefix "box_", and `map_class/<name>` for every class.

        `map`, `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, `mar_1`, `mar_10`, `mar_100`, `mar_small`,
        `mar_medium`, `mar_large`. A metric without any objects to score is -1, as in pycocotools. Boxes are the tight
        boxes of the predicted masks. An image given twice, as by a distributed sampler that fills its last batch,
        counts once.

        Raises:
            DataError: the image of a prediction is not in the dataset, or its masks do not have the image's size.
        """
        return self.score(instances)[0]

    def score(self, instances: Iterable[Instances]) -> tuple[dict[str, float], NDArray[np.float64]]:
        """The same metrics, and the precision of the masks, (10, 101, K, 4, 3) as in `Arrays`."""
        found = self.by_image(instances)
        masks = self._arrays("segm", found)
        metrics = summarize(*masks)
        metrics |= {f"box_{key}": value for key, value in summarize(*self._arrays("bbox", found)).items()}
        for index, name in enumerate(self.class_names()):
            metrics[f"map_class/{name}"] = mean_of_present(masks[0][:, :, index, 0, -1])
        return metrics, masks[0]

    def class_names(self) -> list[str]:
        """The category names; a name that occurs more than once is followed by the category id."""
        names = [category.name for category in self.categories]
        return [
            category.name if names.count(category.name) == 1 else f"{category.name} ({category.id})"
            for category in self.categories
        ]

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """The scored objects of an image as COCO annotations. The caller must not modify them."""
        return self._truth[self._numbers[image_id] - 1]

    def by_image(self, instances: Iterable[Instances]) -> dict[int, Instances]:
        """Image id -> its predictions, the first if there are several. Raises DataError as scoring does."""
        found: dict[int, Instances] = {}
        for item in instances:
            if item.image_id not in self.sizes:
                raise DataError(
                    f"Expected predictions for the dataset's {len(self.sizes)} images only, found image_id "
                    f"{item.image_id}. Score against the split that was predicted. A Predictor numbers images by their "
                    'position, unless it is given image_ids=rows["image_id"].'
                )
            size = self.sizes[item.image_id]
            if len(item) and tuple(item.size) != size:
                raise DataError(
                    f"Expected masks of image_id {item.image_id} at its original size {size} (height, width), found "
                    f"{tuple(item.size)}. Pass the original sizes to `to_instances`."
                )
            found.setdefault(item.image_id, item)
        return found

    def _arrays(self, kind: Kind, found: Mapping[int, Instances]) -> Arrays:
        chunks = (self._chunk(start, kind, found) for start in range(0, len(self._truth), IMAGES_AT_ONCE))
        score = _hotcoco_arrays if self.engine == "hotcoco" else _pycocotools_arrays
        return score(chunks, [{"id": self._classes[one.id], "name": one.name} for one in self.categories], kind)

    def _chunk(self, start: int, kind: Kind, found: Mapping[int, Instances]) -> Chunk:
        """At most `IMAGES_AT_ONCE` images with their ground truth and predictions, copied because engines modify them.

        Annotations are renumbered from 1 because pycocotools treats a match with annotation id 0 as unmatched, and
        categories because hotcoco rejects negative ids.
        """
        images, truth = [], []
        predicted: list[Results] = []
        for image_id, (height, width) in islice(self.sizes.items(), start, start + IMAGES_AT_ONCE):
            number = self._numbers[image_id]
            images.append({"id": number, "height": height, "width": width})
            truth += [item | {"category_id": self._classes[item["category_id"]]} for item in self._truth[number - 1]]
            if image_id in found:
                predicted.append(self._results(found[image_id], number, kind))
        first = 1 + sum(map(len, self._truth[:start]))
        numbered = [item | {"id": id_} for id_, item in enumerate(truth, first)]
        if kind == "bbox":
            return images, numbered, np.concatenate([np.zeros((0, 7)), *predicted])
        return images, numbered, list(chain.from_iterable(predicted))

    def _results(self, instances: Instances, number: int, kind: Kind) -> Results:
        """An image's predictions of the scored categories: boxes as rows (n, 7), masks as COCO results without a box.

        A result must not contain both: see `Instances.to_coco`.
        """
        kept = np.flatnonzero(np.isin(instances.category_ids, list(self._classes)))
        scores = instances.scores[kept]
        labels = np.array([self._classes[key] for key in instances.category_ids[kept].tolist()], np.int64)
        if kind == "bbox":
            return np.column_stack([np.full(len(kept), number), instances.boxes[kept], scores, labels])
        size = list(instances.size)
        return [
            {
                "image_id": number,
                "category_id": label,
                "segmentation": {"size": size, "counts": instances.rles[index]["counts"].decode("ascii")},
                "score": score,
            }
            for index, label, score in zip(kept.tolist(), labels.tolist(), scores.tolist(), strict=True)
        ]


def summarize(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """The twelve metrics of pycocotools' summary from the precision and recall `Arrays`."""
    metrics = {"map": mean_of_present(precision[:, :, :, 0, -1])}
    metrics["map_50"] = mean_of_present(precision[IOU_50, :, :, 0, -1])
    metrics["map_75"] = mean_of_present(precision[IOU_75, :, :, 0, -1])
    for index, area in list(enumerate(AREAS))[1:]:
        metrics[f"map{area}"] = mean_of_present(precision[:, :, :, index, -1])
    for index, limit in enumerate(LIMITS):
        metrics[f"mar_{limit}"] = mean_of_present(recall[:, :, 0, index])
    for index, area in list(enumerate(AREAS))[1:]:
        metrics[f"mar{area}"] = mean_of_present(recall[:, :, index, -1])
    return metrics


def mean_of_present(values: NDArray[np.float64]) -> float:
    """The mean of the values other than -1; -1 if there are none."""
    present = values[values > -1]
    return float(np.mean(present)) if present.size else -1.0


def _hotcoco_arrays(chunks: Iterable[Chunk], categories: list[dict[str, Any]], kind: Kind) -> Arrays:
    """Score with hotcoco's streaming evaluator, which stores only the matches and so needs little memory."""
    from hotcoco import StreamingEval

    streaming = StreamingEval(categories, iou_type=kind)
    for images, truth, predicted in chunks:
        streaming.update(images, truth, predicted)
    evaluator = streaming.finalize()
    evaluator.accumulate()
    return _precision_and_recall(evaluator.eval)


def _pycocotools_arrays(chunks: Iterable[Chunk], categories: list[dict[str, Any]], kind: Kind) -> Arrays:
    """Score with pycocotools, with its printed output discarded."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    parts = list(zip(*chunks, strict=True))
    images, annotations = (list(chain.from_iterable(part)) for part in parts[:2])
    predicted = np.concatenate(parts[2]) if kind == "bbox" else list(chain.from_iterable(parts[2]))
    truth, empty = COCO(), COCO()
    truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
    empty.dataset = {"images": images, "annotations": [], "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        empty.createIndex()
        # `loadRes` fails on an empty list.
        evaluator = COCOeval(truth, truth.loadRes(predicted) if len(predicted) else empty, kind)
        evaluator.evaluate()
        evaluator.accumulate()
    return _precision_and_recall(evaluator.eval)


def _precision_and_recall(arrays: Mapping[str, Any] | None) -> Arrays:
    if arrays is None:
        raise RuntimeError("The scoring engine returned no arrays.")
    return np.asarray(arrays["precision"], np.float64), np.asarray(arrays["recall"], np.float64)
