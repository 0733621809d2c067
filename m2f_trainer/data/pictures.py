"""Images with their masks drawn over them: for the doctor's page, and to look at augmented samples."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2f_trainer.data import masks, rle
from m2f_trainer.data.doctor import Examination
from m2f_trainer.data.images import open_image
from m2f_trainer.data.inspection import Scan
from m2f_trainer.data.transforms import TrainTransform

_TINT = 0.4
_GOLDEN_RATIO = 0.618033988749895


def draw_masks(image: Image.Image, looks: Iterable[tuple[rle.Box, rle.Bitmap]]) -> Image.Image:
    """A copy of an RGB image with each bitmap, at its box, tinted and outlined in a colour of its own."""
    pixels = np.asarray(image).astype(np.float32)
    for number, ((x0, y0, x1, y1), bitmap) in enumerate(looks):
        ink = 255 * np.array(colorsys.hsv_to_rgb((0.58 + number * _GOLDEN_RATIO) % 1, 0.8, 1.0), dtype=np.float32)
        inside = bitmap.astype(np.bool_)
        framed = np.pad(inside, 1)
        core = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
        part = pixels[y0:y1, x0:x1]
        part[inside] = (1 - _TINT) * part[inside] + _TINT * ink
        part[inside & ~core] = ink
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_objects(source: Mapping[str, Any], objects: Iterable[Mapping[str, Any]], longest: int) -> Image.Image:
    """An image with the masks of its rows' `objects`, brought to `longest` pixels of its longer side at most."""
    image = open_image(source, "picture")
    size = image.size
    image.thumbnail((longest, longest))
    looks = []
    for one in objects:
        bitmap = masks.decode(one["counts"], size[1], size[0])
        small = Image.fromarray(np.ascontiguousarray(bitmap) * np.uint8(255)).resize(
            image.size, Image.Resampling.BILINEAR
        )
        looks.append(((0, 0, image.width, image.height), (np.asarray(small) > 127).astype(np.uint8)))
    return draw_masks(image, looks)


def draw_sample(sample: Mapping[str, Any]) -> Image.Image:
    """A transform's sample as the model is shown it."""
    pixels = np.ascontiguousarray(sample["pixel_values"].numpy().transpose(1, 2, 0))  # (H, W, 3)
    looks = zip(map(tuple, sample["boxes"].tolist()), sample["masks"], strict=True)
    return draw_masks(Image.fromarray(pixels), looks)


def preview(examination: Examination, count: int, transform: TrainTransform, folder: Path) -> list[Path]:
    """Draws the first `count` training samples of epoch 0, and of the epochs after it where there are fewer images."""
    rows = _Rows(examination.scans.get("train") or next(iter(examination.scans.values())))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        epoch, index = divmod(number, len(rows))
        paths.append(folder / f"sample_{number:03d}.jpg")
        draw_sample(transform(rows[index], epoch, index, rows)).save(paths[-1], quality=90)
    return paths


class _Rows(Sequence[Mapping[str, Any]]):
    """Scans as rows, each made when it is asked for: the images of a Hub dataset are in them."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self._scans = scans

    def __len__(self) -> int:
        return len(self._scans)

    def __getitem__(self, place: Any) -> Any:
        return self._scans[place].row()
