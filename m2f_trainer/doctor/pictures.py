"""Images with their masks drawn on them, for the page of `m2f check`, and augmented training samples."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2f_trainer.data.images import open_image
from m2f_trainer.data.reading import Reading
from m2f_trainer.data.transforms import TrainTransform
from m2f_trainer.doctor.examine import Examination
from m2f_trainer.doctor.scan import Scan
from m2f_trainer.masks import rle
from m2f_trainer.masks.rle import Size
from m2f_trainer.viz.overlay import Shape, color, draw_sample, draw_shapes, save_image

MOST_DRAWN = 5000  # objects of a picture


def draw_objects(
    source: Mapping[str, Any],
    objects: Iterable[Mapping[str, Any]],
    longest: int,
    size: Size | None = None,
    reading: Reading = Reading(),  # noqa: B008 (it is frozen)
) -> Image.Image:
    """An image with the masks of its row's `objects`, resized so that no side is longer than `longest` pixels.

    Only the first `MOST_DRAWN` objects are drawn. `size` is the annotated size, by default that of the stored image.
    """
    image = open_image(source, "picture", size=size, displayed=reading.displayed, pixel_range=reading.pixel_range)
    full = image.size
    image.thumbnail((longest, longest))
    across, down = image.width / full[0], image.height / full[1]
    shapes = []
    for number, one in enumerate(islice(objects, MOST_DRAWN)):
        runs = rle.read_runs_of_any_size(one["counts"])
        box = rle.box_of(runs, full[1])
        if box[2] > box[0]:
            left, top = int(box[0] * across), int(box[1] * down)
            right = min(image.width, math.ceil(box[2] * across))
            bottom = min(image.height, math.ceil(box[3] * down))
            bitmap = Image.fromarray(np.ascontiguousarray(rle.paint(runs, box, full[1])) * np.uint8(255))
            small = bitmap.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
            shape = Shape((left, top, right, bottom), (np.asarray(small) > 127).astype(np.uint8), color(number))
            shapes.append(shape)
    return draw_shapes(image, shapes)


def preview(examination: Examination, count: int, transform: TrainTransform, folder: Path) -> list[Path]:
    """Draw `count` training samples of epoch 0 and, if there are fewer images, of the following epochs."""
    rows = _Rows(examination.scans.get("train") or next(iter(examination.scans.values())))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        epoch, index = divmod(number, len(rows))
        paths.append(folder / f"sample_{number:03d}.jpg")
        save_image(draw_sample(transform(rows[index], epoch, index, rows)), paths[-1], quality=90)
    return paths


class _Rows(Sequence[Mapping[str, Any]]):
    """Scans as rows, built when they are accessed, because rows of a Hub dataset contain the image data."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self._scans = scans

    def __len__(self) -> int:
        return len(self._scans)

    def __getitem__(self, place: Any) -> Any:
        return self._scans[place].row()
