"""Crop and resize images and masks in one step, computing only the pixels that are kept.

Frames: *original* is the stored image; *resized* is the image scaled with its aspect ratio kept; *padded* is the input
of the model, with the resized image in the top left corner.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from m2f_trainer.masks import rle
from m2f_trainer.masks.rle import Box, Size

Pixels: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Crop:
    """The part of an image that a sample shows: a window of the resized frame, flipped left to right if `flip`, then
    rotated anticlockwise by `quarter_turns` times 90 degrees.

    An object is left out if less than the fraction `least_visible` of it is in the window, unless its visible part
    fills at least a hundredth of the window, since a window shows only a small part of a very large object.
    """

    original: Size
    resized: Size
    window: Box
    flip: bool = False
    quarter_turns: int = 0
    least_visible: float = 0.0

    @property
    def scale(self) -> tuple[float, float]:
        """Resized pixels per original pixel, along y and x."""
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    def source(self, window: Box) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in the original frame of a window of the resized frame."""
        sy, sx = self.scale
        x0, y0, x1, y1 = window
        height, width = self.original
        return x0 / sx, y0 / sy, min(x1 / sx, width), min(y1 / sy, height)


def crop_image(image: Image.Image, crop: Crop, colors: tuple[float, ...] | None = None, fast: bool = False) -> Pixels:
    """The window of the resized image (h, w, 3), resized from that part of the original with Pillow's bilinear filter.

    `colors` are the 12 coefficients of `Image.convert("RGB", ...)`. `fast` takes two thirds of the time and may differ
    by one level of 255. It is for training only; predictions must equal those of exported models, which use Pillow's
    filter.
    """
    x0, y0, x1, y1 = crop.window
    shrink_x, shrink_y = crop.original[1] / image.width, crop.original[0] / image.height
    left, top, right, bottom = crop.source(crop.window)
    part = (left / shrink_x, top / shrink_y, min(right / shrink_x, image.width), min(bottom / shrink_y, image.height))
    small_first = colors is not None and image.width * image.height < (x1 - x0) * (y1 - y0)
    if small_first:
        image = image.convert("RGB", colors)
    if fast and not (left or top) and part[2] >= image.width and part[3] >= image.height:
        pixels = _resize_whole(np.asarray(image), (y1 - y0, x1 - x0))
    else:
        pixels = np.asarray(image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=part))
    if colors is None or small_first:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert("RGB", colors))


def _resize_whole(pixels: Pixels, size: Size) -> Pixels:
    """The whole image resized as by Pillow's bilinear filter, to within one level; faster than Pillow."""
    if pixels.shape[:2] == size:
        return pixels
    bands = torch.tensor(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
    resized = torch.nn.functional.interpolate(bands, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def crop_mask(counts: str, crop: Crop) -> tuple[Box, rle.Bitmap] | None:
    """An object's box in the frame of the crop, and its bitmap in that box; None if no part of it is in the crop."""
    height, width = crop.original
    runs = rle.read_runs(counts, height, width)
    window = _visible_window(rle.box_of(runs, height), crop)
    if window is None:
        return None
    x0, y0 = crop.window[:2]
    placed = (window[0] - x0, window[1] - y0, window[2] - x0, window[3] - y0)
    trimmed = trim(_resize_mask(runs, window, crop), placed)
    return None if trimmed is None or _is_sliver(trimmed[1], runs, crop) else _orient_box(*trimmed, crop)


def _is_sliver(bitmap: rle.Bitmap, runs: rle.Runs, crop: Crop) -> bool:
    """Whether too little of an object is in the crop, by the rule of `Crop`."""
    if not crop.least_visible:
        return False
    x0, y0, x1, y1 = crop.window
    sy, sx = crop.scale
    whole, frame = rle.area(runs) * sy * sx, (x1 - x0) * (y1 - y0)
    return bool(bitmap.sum() < min(crop.least_visible * whole, frame / 100))


def _orient_box(box: Box, bitmap: rle.Bitmap, crop: Crop) -> tuple[Box, rle.Bitmap]:
    """Box and bitmap of a window, flipped and rotated as the crop."""
    left, top, right, bottom = box
    width, height = crop.window[2] - crop.window[0], crop.window[3] - crop.window[1]
    if crop.flip:
        left, right = width - right, width - left
    for _ in range(crop.quarter_turns % 4):
        left, top, right, bottom = top, width - right, bottom, width - left
        width, height = height, width
    return (left, top, right, bottom), np.ascontiguousarray(orient(bitmap, crop))


def in_crop(boxes: npt.NDArray[np.float64], crop: Crop) -> npt.NDArray[np.bool_]:
    """Which of the boxes (N, 4) of the original frame meet the window of a crop, (N,)."""
    x0, y0, x1, y1 = crop.source(crop.window)
    return np.asarray((boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0))


def orient(pixels: Pixels, crop: Crop) -> Pixels:
    """Pixels (h, w) or (h, w, 3) of a window, flipped and rotated as the crop."""
    return np.rot90(pixels[:, ::-1] if crop.flip else pixels, crop.quarter_turns)


def _visible_window(box: Box, crop: Crop) -> Box | None:
    """The part of the crop's window that a box of the original frame covers; None if there is none."""
    sy, sx = crop.scale
    x0, y0 = max(crop.window[0], math.floor(box[0] * sx)), max(crop.window[1], math.floor(box[1] * sy))
    x1, y1 = min(crop.window[2], math.ceil(box[2] * sx)), min(crop.window[3], math.ceil(box[3] * sy))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _resize_mask(runs: rle.Runs, window: Box, crop: Crop) -> npt.NDArray[np.bool_]:
    """The mask in a window of the resized frame: resized with a bilinear filter, then thresholded at one half.

    The result equals that of resizing the whole mask: one filter support beyond the window is decoded too.
    """
    x0, y0, x1, y1 = crop.source(window)
    height, width = crop.original
    reach_y, reach_x = (math.ceil(max(1.0, 1 / scale)) + 1 for scale in crop.scale)
    left, top = max(0, math.floor(x0) - reach_x), max(0, math.floor(y0) - reach_y)
    right, bottom = min(width, math.ceil(x1) + reach_x), min(height, math.ceil(y1) + reach_y)
    part = rle.paint(runs, (left, top, right, bottom), height)
    if crop.resized == crop.original:
        cropped = part[window[1] - top : window[3] - top, window[0] - left : window[2] - left]
        return cropped.astype(np.bool_)
    image = Image.fromarray(np.ascontiguousarray(part) * np.uint8(255))
    size = (window[2] - window[0], window[3] - window[1])
    seen = image.resize(size, Image.Resampling.BILINEAR, box=(x0 - left, y0 - top, x1 - left, y1 - top))
    covered: npt.NDArray[np.bool_] = np.asarray(seen) > 127
    return covered


def trim(bitmap: npt.NDArray[np.bool_], box: Box) -> tuple[Box, rle.Bitmap] | None:
    """The bitmap without empty rows and columns at its edges, and its box; None for an empty bitmap."""
    rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
    if not len(rows):
        return None
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    trimmed = np.ascontiguousarray(bitmap[y0:y1, x0:x1]).view(np.uint8)
    return (box[0] + x0, box[1] + y0, box[0] + x1, box[1] + y1), trimmed


@dataclass(frozen=True)
class Frames:
    """The sizes of one image in its three frames."""

    original: Size
    resized: Size
    padded: Size


def resize_to_fit(original: Size, padded: Size) -> Frames:
    """The frames of an image: resized to the largest size of the same aspect ratio that fits, at least 1 x 1."""
    scale = min(padded[0] / original[0], padded[1] / original[1])
    height, width = (max(1, min(limit, round(side * scale))) for side, limit in zip(original, padded, strict=True))
    return Frames(original, (height, width), padded)
