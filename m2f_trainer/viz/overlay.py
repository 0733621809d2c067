"""Instances drawn on their image: tinted masks with outlines, and a name and score where there is room."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from m2f_trainer.masks import rle

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

TINT = 0.45
GOLDEN_RATIO = 0.618033988749895


class Drawable(Protocol):
    """The n instances of one image, as `m2f_trainer.inference.instances.Instances` has them, in the original frame."""

    @property
    def size(self) -> rle.Size:
        """(H, W) of the image."""

    @property
    def category_ids(self) -> NDArray[np.int64]:
        """(n,)."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """(n,); NaN where there is no score."""

    @property
    def boxes(self) -> NDArray[np.float64]:
        """(n, 4): x, y, width, height."""

    @property
    def rles(self) -> list[dict[str, Any]]:
        """n COCO run-length encodings."""


def colour(index: int) -> Colour:
    """The index-th of an endless row of bright colours, neighbours far apart in hue."""
    hue = (0.58 + index * GOLDEN_RATIO) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.75, 0.9, 0.6)[index % 3], (1.0, 0.9)[index % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_instances(
    image: Image.Image, instances: Drawable, names: Mapping[int, str], *, boxes: bool = False
) -> Image.Image:
    """A copy of `image` with every instance in a colour of its own, small ones over large ones.

    Args:
        image: the original image; its size must be that of the instances.
        names: category id -> word; an id without one is written as it is.
        boxes: draw the bounding boxes too.

    Raises:
        ValueError: the image has another size than the instances.
    """
    if (image.height, image.width) != tuple(instances.size):
        raise ValueError(
            f"Expected the image that was predicted, {instances.size[0]}x{instances.size[1]} (height x width), found "
            f"{image.height}x{image.width}. Pass the original image, not a resized one."
        )
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    line = max(1, round(min(instances.size) / 400))
    for index in np.argsort(-instances.boxes[:, 2:].prod(axis=1), kind="stable").tolist():
        _paint(pixels, _within_box(instances, index), colour(index), line)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    if boxes:
        for index, (x, y, width, height) in enumerate(instances.boxes.tolist()):
            draw.rectangle((x, y, x + max(0, width - 1), y + max(0, height - 1)), outline=colour(index), width=line)
    _write_labels(draw, instances, names)
    return picture


def _within_box(instances: Drawable, index: int) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Rows, columns and the mask within its box, so that a crowd of small objects stays cheap."""
    x, y, width, height = (int(value) for value in instances.boxes[index])
    runs = rle.read_own(instances.rles[index]["counts"])
    mask = rle.paint(runs, (x, y, x + width, y + height), instances.size[0])
    return slice(y, y + height), slice(x, x + width), mask.astype(np.bool_)


def _paint(pixels: NDArray[np.float32], part: tuple[slice, slice, NDArray[np.bool_]], tint: Colour, line: int) -> None:
    """Tint the mask's pixels, and its border in full colour, in place."""
    rows, columns, mask = part
    target = pixels[rows, columns]
    ink = np.array(tint, np.float32)
    target[mask] = (1 - TINT) * target[mask] + TINT * ink
    target[mask & ~_eroded(mask, line)] = ink


def _eroded(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """The pixels that are at least `steps` away, up, down and sideways, from the background or the box's edge."""
    inside = np.pad(mask, 1)
    for _ in range(steps):
        core = inside[1:-1, 1:-1]
        core = core & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        inside = np.pad(core, 1)
    return inside[1:-1, 1:-1]


def _write_labels(draw: ImageDraw.ImageDraw, instances: Drawable, names: Mapping[int, str]) -> None:
    """Name and score of each instance (truth has none), best first; one that finds no free place is left out.

    A place is free where it covers neither another label nor the centre of another instance.
    """
    sides = np.sqrt(instances.boxes[:, 2:].prod(axis=1))
    largest = min(min(instances.size) / 32, float(np.median(sides)) / 2 if len(sides) else 32)  # half an object
    font = ImageFont.load_default(size=float(np.clip(largest, 9, 32)))
    taken = np.zeros(instances.size, np.uint16)  # how many labels and centres lie on a pixel
    middles = (instances.boxes[:, :2] + instances.boxes[:, 2:] / 2)[:, ::-1]  # (n, 2), y and x
    centres = np.clip(middles, 0, np.array(taken.shape) - 1).astype(int).tolist()
    for row, column in centres:
        taken[row, column] += 1
    for index, (row, column) in enumerate(centres):
        category_id = int(instances.category_ids[index])
        score = instances.scores[index]
        text = names.get(category_id, str(category_id)) + ("" if np.isnan(score) else f" {100 * score:.0f}%")
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        places = _places(instances.boxes[index], (right + 4, bottom + 3), instances.size)
        taken[row, column] -= 1
        free = [place for place in places if not taken[_pixels(place)].any()]
        taken[row, column] += 1
        if not free or instances.boxes[index, 2] <= 0:
            continue
        taken[_pixels(free[0])] += 1
        ink = colour(index)
        draw.rectangle(free[0], fill=ink)
        dark = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2] > 140
        draw.text((free[0][0] + 2, free[0][1] + 1), text, fill=(0, 0, 0) if dark else (255, 255, 255), font=font)


def _places(box: NDArray[np.float64], label: tuple[float, float], size: rle.Size) -> list[Rectangle]:
    """Where a label of this width and height may go: above the box, below it, or at its top, within the image."""
    x, y, _, box_height = box.tolist()
    left = max(0.0, min(x, size[1] - label[0] - 1))
    tops = [y - label[1], y + box_height, y]
    return [
        (left, top, left + label[0], top + label[1])
        for top in tops
        if (top >= 0 and top + label[1] < size[0]) or top == y
    ]


def _pixels(place: Rectangle) -> tuple[slice, slice]:
    """The rows and columns that a rectangle touches."""
    left, top, right, bottom = place
    return slice(int(top), math.ceil(bottom)), slice(int(left), math.ceil(right))


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


def draw_sample(sample: Mapping[str, Any]) -> Image.Image:
    """A transform's sample as the model is shown it."""
    pixels = np.ascontiguousarray(sample["pixel_values"].numpy().transpose(1, 2, 0))  # (H, W, 3)
    looks = zip(map(tuple, sample["boxes"].tolist()), sample["masks"], strict=True)
    return draw_masks(Image.fromarray(pixels), looks)
