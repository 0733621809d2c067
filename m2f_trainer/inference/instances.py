"""The instances predicted in one image, as RLE masks in the original frame; to and from COCO results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from m2f_trainer.config.arguments import PixelRange
from m2f_trainer.data.images import ImageSource, is_deep, open_image
from m2f_trainer.errors import MaskError, needs
from m2f_trainer.masks import rle
from m2f_trainer.masks.rle import Bitmap, Box, Size
from m2f_trainer.masks.segmentation import decode, to_counts


@dataclass(frozen=True, eq=False)
class Instances:
    """The n instances predicted in one image, best first, all in the original frame.

    Attributes:
        image_id: the dataset's id of the image.
        category_ids: (n,) int64, the dataset's own category ids.
        scores: (n,) float64 in [0, 1].
        rles: n COCO run-length encodings, `{"size": [H, W], "counts": bytes}`, column-major and compressed.
        boxes: (n, 4) float64, x, y, width, height: the tight boxes of the masks.
        size: (H, W) of the original image.
        pixel_range: how the `Predictor` read an image of more than 8 bits, see its attribute of this name.

    >>> (found,) = Instances.from_coco([
    ...     {"image_id": 5, "category_id": 3, "score": 0.4, "segmentation": {"size": [4, 4], "counts": "52203"}},
    ...     {"image_id": 5, "category_id": 1, "score": 0.9, "segmentation": {"size": [4, 4], "counts": "52203"}},
    ... ])
    >>> len(found), found.category_ids.tolist(), found.scores.tolist(), len(found.above(0.5))
    (2, [1, 3], [0.9, 0.4], 1)
    """

    image_id: int
    category_ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    rles: list[dict[str, Any]]
    boxes: NDArray[np.float64]
    size: Size
    pixel_range: PixelRange = None

    def __len__(self) -> int:
        return len(self.rles)

    def above(self, threshold: float | Mapping[int, float]) -> Instances:
        """Those whose score is greater than `threshold`, one for all or by category id; zero drops empty masks only."""
        of_class = threshold if isinstance(threshold, Mapping) else dict.fromkeys(self.category_ids.tolist(), threshold)
        lowest = [of_class[key] for key in self.category_ids.tolist()]
        return self._only(np.flatnonzero(self.scores > np.asarray(lowest)))

    def best(self, count: int) -> Instances:
        """The `count` instances with the highest scores, or all if there are fewer."""
        return self._only(np.arange(min(count, len(self))))

    def _only(self, kept: NDArray[np.intp]) -> Instances:
        """The instances at these places."""
        return replace(
            self,
            category_ids=self.category_ids[kept],
            scores=self.scores[kept],
            rles=[self.rles[index] for index in kept],
            boxes=self.boxes[kept],
        )

    def mask(self, index: int) -> NDArray[np.uint8]:
        """(H, W) of zeros and ones."""
        return decode(self.rles[index]["counts"].decode("ascii"), *self.size)

    def to_coco(self) -> list[dict[str, Any]]:
        """COCO results entries, new ones at each call, because scorers write into them.

        They carry no `bbox`: with one, pycocotools takes the box's area for the small, medium and large ranges.
        """
        return [
            {
                "image_id": self.image_id,
                "category_id": int(category_id),
                "segmentation": {"size": list(self.size), "counts": rle["counts"].decode("ascii")},
                "score": float(score),
            }
            for category_id, score, rle in zip(self.category_ids, self.scores, self.rles, strict=True)
        ]

    @classmethod
    def from_coco(cls, results: Iterable[Mapping[str, Any]]) -> list[Instances]:
        """The inverse of `to_coco` for the entries of many images, in the order in which the images first appear.

        Raises:
            MaskError: an entry's run lengths don't fill its image, or the sizes within one image disagree.
        """
        by_image: dict[int, list[Mapping[str, Any]]] = {}
        for result in results:
            by_image.setdefault(int(result["image_id"]), []).append(result)
        return [_instances_of(image_id, entries) for image_id, entries in by_image.items()]

    def to_supervision(self, names: Mapping[int, str] | None = None) -> Any:
        """These instances as `supervision.Detections`, whose masks are dense, with `names` under "class_name".

        Raises:
            MissingPackageError: supervision is not installed.
        """
        needs("supervision", extra="supervision")
        import supervision

        x, y, width, height = self.boxes.T
        words = names or {}
        return supervision.Detections(
            xyxy=np.stack([x, y, x + width, y + height], axis=1),
            mask=np.stack([self.mask(index) for index in range(len(self))]).astype(bool) if len(self) else None,
            confidence=self.scores,
            class_id=self.category_ids,
            data={"class_name": np.array([words.get(int(k), str(k)) for k in self.category_ids], dtype=str)},
        )

    def overlay(
        self,
        image: ImageSource,
        names: Mapping[int, str] | None = None,
        *,
        boxes: bool = False,
        legend: bool = True,
    ) -> Image.Image:
        """A copy of `image` with these instances drawn on it, small ones over large ones.

        Few large objects get labels. Otherwise colour is the class, where there are several, and a strip below the
        image names the classes that it shows. See `m2f_trainer.viz.overlay`.

        Args:
            image: the original image, of the size that was predicted; paths, bytes, arrays, and Pillow images of more
                than 8 bits are read as a `Predictor` reads them.
            names: category id -> name, of all classes of the model; an id without a name is written as it is.
            boxes: draw the bounding boxes too.
            legend: add the strip where the colours need it; without it the result has the size of `image`.

        Raises:
            ValueError: the image has another size than the instances.
            ImageError: the image can't be read.
        """
        from m2f_trainer.viz.overlay import add_legend

        drawn, colors = self.drawn_on(image, names, boxes=boxes)
        return add_legend(drawn, colors) if legend else drawn

    def drawn_on(
        self,
        image: ImageSource,
        names: Mapping[int, str] | None = None,
        *,
        boxes: bool = False,
        labelled: bool | None = None,
    ) -> tuple[Image.Image, Mapping[str, tuple[int, int, int]]]:
        """As `overlay`, but the legend is returned as class name -> colour, to go with several images.

        `labelled` says whether to use labels; by default, if they fit.
        """
        from m2f_trainer.viz.overlay import Shape, choose_style, draw_shapes

        if not isinstance(image, Image.Image) or is_deep(image):
            where = str(image) if isinstance(image, (str, Path)) else "image"
            image = open_image(image, where, displayed=True, pixel_range=self.pixel_range)
        if (image.height, image.width) != tuple(self.size):
            remedy = "Pass the original image, not a resized one."
            if (image.width, image.height) == tuple(self.size):
                remedy = "Pass its path: Pillow does not turn a photo by its EXIF orientation, but a Predictor does."
            raise ValueError(
                f"Expected the image that was predicted, {self.size[0]}x{self.size[1]} (height x width), found "
                f"{image.height}x{image.width}. {remedy}"
            )
        ids, scores = self.category_ids.tolist(), self.scores.tolist()
        style = choose_style(self.size, self.boxes, ids, scores, names or {}, labelled)
        order = np.argsort(-self.boxes[:, 2:].prod(axis=1), kind="stable").tolist()
        shapes = (Shape(*self._bitmap(index), style.colors[index], style.labels[index]) for index in order)
        return draw_shapes(image, shapes, boxes=boxes), style.legend

    def _bitmap(self, index: int) -> tuple[Box, Bitmap]:
        """The tight box of a mask, x0, y0, x1, y1, and the mask within it, so that many small objects stay cheap."""
        runs = rle.read_runs_of_any_size(self.rles[index]["counts"])
        box = rle.box_of(runs, self.size[0])
        return box, rle.paint(runs, box, self.size[0])


def _instances_of(image_id: int, entries: Sequence[Mapping[str, Any]]) -> Instances:
    sizes = {(int(entry["segmentation"]["size"][0]), int(entry["segmentation"]["size"][1])) for entry in entries}
    if len(sizes) != 1:
        raise MaskError(
            f"Expected every prediction of image_id {image_id} to have one mask size, found {sorted(sizes)}. "
            "Write the predictions again at the size of the original image."
        )
    size = sizes.pop()
    where = f"a prediction of image_id {image_id}"
    counts = [to_counts(entry["segmentation"], *size, where) for entry in entries]
    scores = np.array([entry["score"] for entry in entries], np.float64)
    order = np.argsort(-scores, kind="stable")
    rles = [{"size": list(size), "counts": counts[index].encode("ascii")} for index in order]
    category_ids = np.array([entry["category_id"] for entry in entries], np.int64)
    return Instances(image_id, category_ids[order], scores[order], rles, tight_boxes(rles), size)


def tight_boxes(rles: list[dict[str, Any]]) -> NDArray[np.float64]:
    """(n, 4) x, y, width, height; zeros for an empty mask."""
    if not rles:
        return np.zeros((0, 4))
    return np.asarray(coco_mask.toBbox(rles), np.float64)
