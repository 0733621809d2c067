"""Draw objects on their image: tinted masks with outlines, and either labels or a legend of the classes.

If the objects have labels, or if there is one class only, each object has its own colour, so that neighbours can be
told apart. If labels would hide the objects, the colour shows the class, and a legend names it; touching objects of one
class are still separated by their outlines.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from m2f_trainer.errors import printable
from m2f_trainer.masks.rle import Bitmap, Box, Size
from m2f_trainer.run_folder import write_atomically
from m2f_trainer.viz.charts import plain_text
from m2f_trainer.viz.fonts import draw_text, text_size, warn_of_boxes

Color: TypeAlias = tuple[int, int, int]
Rectangle: TypeAlias = tuple[float, float, float, float]

TINT = 0.45  # share of the colour inside a mask; its outline has the colour alone
GOLDEN_RATIO = 0.618033988749895
MAX_LABELS = 20  # images with more objects have no labels
MAX_COVERED = 0.15  # nor have images of which labels would cover a larger share
LONGEST_NAME = 80  # characters in a legend


class Shape(NamedTuple):
    """One object to draw, in the frame of the image."""

    box: Box
    """x0, y0, x1, y1 in pixels, x1 and y1 excluded."""
    bitmap: Bitmap
    """(y1 - y0, x1 - x0) of zeros and ones."""
    color: Color
    label: str = ""
    """Written beside the object; left out where no place is free."""


@dataclass(frozen=True)
class Style:
    """Colours and labels of the n objects of one image, and the legend of the colours.

    Attributes:
        colors: n colours.
        labels: n labels; all empty if they would hide the objects.
        legend: class name -> colour, if the colour shows the class; otherwise empty.
    """

    colors: Sequence[Color]
    labels: Sequence[str]
    legend: Mapping[str, Color] = field(default_factory=dict)


def color(index: int) -> Color:
    """The index-th colour of an endless sequence of bright colours; successive ones differ strongly in hue."""
    hue = (0.58 + index * GOLDEN_RATIO) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.75, 0.9, 0.6)[index % 3], (1.0, 0.9)[index % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def choose_style(
    size: Size,
    boxes: NDArray[np.float64],
    category_ids: Sequence[int],
    scores: Sequence[float],
    names: Mapping[int, str],
    labelled: bool | None = None,
) -> Style:
    """Choose colours and labels for the n objects of an image.

    Labels contain the class, if there are several classes, and the score, if there is one.

    Args:
        size: (H, W) of the image.
        boxes: (n, 4) x, y, width, height.
        category_ids: n ids; an id that `names` lacks is written as it is.
        scores: n scores; NaN for an object without one, such as ground truth.
        names: category id -> name, of all classes of the dataset or model.
        labelled: whether to use labels; by default, if `labels_fit`.
    """
    classes = sorted({*names, *category_ids})
    several = len(classes) > 1
    if several:
        warn_of_boxes(names.values())
    percents = ["" if math.isnan(score) else f"{100 * score:.0f}%" for score in scores]
    labels = _labels(category_ids, percents, names)
    own_colors = [color(index) for index in range(len(labels))]
    if labels_fit(size, boxes, category_ids, names) if labelled is None else labelled:
        return Style(own_colors, labels)
    nothing = [""] * len(labels)
    if not several:
        return Style(own_colors, nothing)
    by_class = {one: color(index) for index, one in enumerate(classes)}
    legend = {names.get(one, str(one)): by_class[one] for one in sorted(set(category_ids))}
    return Style([by_class[one] for one in category_ids], nothing, legend)


def labels_fit(size: Size, boxes: NDArray[np.float64], category_ids: Sequence[int], names: Mapping[int, str]) -> bool:
    """Whether labels with scores would hide little of an image; the arguments are those of `choose_style`.

    There are at most `MAX_LABELS` objects, the median box is larger than the median label, all labels together would
    cover at most `MAX_COVERED` of the image, and none is wider than it. True without objects.
    """
    if not len(boxes) or len(boxes) > MAX_LABELS:
        return not len(boxes)
    pixels, labels = _font_size(size), _labels(category_ids, ["100%"] * len(boxes), names)
    widths, heights = np.array([_label_size(label, pixels) for label in labels]).T
    small_beside_objects = np.median(widths * heights) <= np.median(boxes[:, 2] * boxes[:, 3])
    covered = (widths * heights).sum() / (size[0] * size[1])
    return bool(small_beside_objects and covered <= MAX_COVERED and widths.max() < size[1])


def _labels(category_ids: Sequence[int], scores: Sequence[str], names: Mapping[int, str]) -> list[str]:
    """The class, if there are several, and the score of each object."""
    several = len({*names, *category_ids}) > 1
    words = [printable(names.get(one, str(one))) if several else "" for one in category_ids]
    return [f"{word} {score}".strip() for word, score in zip(words, scores, strict=True)]


def draw_shapes(image: Image.Image, shapes: Iterable[Shape], *, boxes: bool = False) -> Image.Image:
    """A copy of `image` as RGB with the shapes painted one after another; large ones should come first.

    Args:
        shapes: may be a generator: one bitmap is in memory at a time.
        boxes: draw the bounding boxes too.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)  # (H, W, 3)
    size = (image.height, image.width)
    line = max(1, round(min(size) / 400))
    outlined: list[tuple[Box, Color, str]] = []
    for box, bitmap, ink, label in shapes:
        _paint(pixels, box, bitmap.astype(np.bool_), ink, line)
        outlined.append((box, ink, label))
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    if boxes:
        for (x0, y0, x1, y1), ink, _ in outlined:
            draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=ink, width=line)
    _write_labels(draw, outlined, size)
    return picture


def draw_sample(sample: Mapping[str, Any]) -> Image.Image:
    """A training sample as the model gets it: `pixel_values` (3, H, W), with its `masks` at their `boxes`."""
    pixels = np.ascontiguousarray(sample["pixel_values"].numpy().transpose(1, 2, 0))  # (H, W, 3)
    masks = zip(sample["boxes"].tolist(), sample["masks"], strict=True)
    shapes = [Shape((x0, y0, x1, y1), mask, color(k)) for k, ((x0, y0, x1, y1), mask) in enumerate(masks)]
    return draw_shapes(Image.fromarray(pixels), shapes)


def save_image(image: Image.Image, path: Path, **options: Any) -> Path:
    """Write an image atomically in the format of its suffix, following no link; `options` are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix], **options)
    return write_atomically(path, buffer.getvalue())


def add_legend(image: Image.Image, legend: Mapping[str, Color]) -> Image.Image:
    """The image with a strip below it that names the colours; the image itself if the legend is empty."""
    if not legend:
        return image
    pixels = float(np.clip(image.width / 50, 11, 18))  # font size
    side = math.ceil(_label_size("Ag", pixels)[1])  # of a colour's square
    words = [_cut(name, pixels, image.width - 2 * side) for name in legend]
    places, x, y = [], side // 2, side // 2
    for word in words:
        width = 1.5 * side + _label_size(word, pixels)[0] + side
        if x + width > image.width and x > side // 2:
            x, y = side // 2, y + round(1.4 * side)
        places.append((x, y))
        x += math.ceil(width)
    picture = Image.new("RGB", (image.width, image.height + y + round(1.5 * side)), "white")
    picture.paste(image)
    draw = ImageDraw.Draw(picture)
    for word, ink, (left, top) in zip(words, legend.values(), places, strict=True):
        draw.rectangle((left, image.height + top, left + side, image.height + top + side), fill=ink)
        draw_text(draw, (left + 1.5 * side, image.height + top), word, pixels, (0, 0, 0))
    return picture


def _paint(pixels: NDArray[np.float32], box: Box, mask: NDArray[np.bool_], ink: Color, line: int) -> None:
    """Tint the pixels of a mask, and its outline of `line` pixels in full colour, in place."""
    x0, y0, x1, y1 = box
    target, full = pixels[y0:y1, x0:x1], np.array(ink, np.float32)
    target[mask] = (1 - TINT) * target[mask] + TINT * full
    target[mask & ~_eroded(mask, line)] = full


def _eroded(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """The pixels at least `steps` away, up, down and sideways, from the background and from the edge of the box."""
    inside = np.pad(mask, 1)
    for _ in range(steps):
        core = inside[1:-1, 1:-1]
        core = core & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        inside = np.pad(core, 1)
    return inside[1:-1, 1:-1]


def _font_size(size: Size) -> float:
    """The font size of labels on an image of (H, W), in pixels."""
    return float(np.clip(min(size) / 32, 9, 32))


def _cut(name: str, pixels: float, width: float) -> str:
    """The name in one line of at most `width` pixels, or one character."""
    lengths = range(min(len(name), LONGEST_NAME), 1, -1)
    cuts = (plain_text(name, length) for length in lengths)
    return next((cut for cut in cuts if text_size(cut, pixels)[0] <= width), plain_text(name, 1))


def _label_size(label: str, pixels: float) -> tuple[float, float]:
    """Width and height of a label with its margin, in pixels; `pixels` is the font size."""
    right, bottom = text_size(label, pixels)
    return right + 4, bottom + 3


def _write_labels(draw: ImageDraw.ImageDraw, objects: Sequence[tuple[Box, Color, str]], size: Size) -> None:
    """Write each label where it covers neither another label nor the centre of another object, else leave it out."""
    pixels = _font_size(size)
    covered = np.zeros(size, np.uint16)  # (H, W): how many labels and centres lie on a pixel
    centres = [
        (min((y0 + y1) // 2, size[0] - 1), min((x0 + x1) // 2, size[1] - 1)) for (x0, y0, x1, y1), _, _ in objects
    ]
    for centre in centres:
        covered[centre] += 1
    for (box, ink, label), centre in zip(objects, centres, strict=True):
        if not label or box[2] <= box[0]:
            continue
        covered[centre] -= 1  # a label may lie on its own object
        places = _label_places(box, _label_size(label, pixels), size)
        free = next((place for place in places if not covered[_pixels(place)].any()), None)
        covered[centre] += 1
        if free is None:
            continue
        covered[_pixels(free)] += 1
        draw.rectangle(free, fill=ink)
        dark = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2] > 140
        draw_text(draw, (free[0] + 2, free[1] + 1), label, pixels, (0, 0, 0) if dark else (255, 255, 255))


def _label_places(box: Box, label: tuple[float, float], size: Size) -> list[Rectangle]:
    """Candidate positions of a label of this width and height: above the box, below it, or at its top, in the image."""
    x0, y0, _, y1 = box
    left = max(0.0, min(x0, size[1] - label[0] - 1))
    return [
        (left, top, left + label[0], top + label[1])
        for top in (y0 - label[1], y1, y0)
        if (top >= 0 and top + label[1] < size[0]) or top == y0
    ]


def _pixels(place: Rectangle) -> tuple[slice, slice]:
    """The rows and columns that a rectangle touches."""
    left, top, right, bottom = place
    return slice(int(top), math.ceil(bottom)), slice(int(left), math.ceil(right))
