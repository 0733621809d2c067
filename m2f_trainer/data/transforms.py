"""Rows to samples of the recipe's size: the one preprocessing for evaluation, and its training variant.

Frames: *original* is the stored image, *resized* is it scaled with its aspect kept, *padded* is the recipe's size, with
the resized image in the top left corner. Sizes are (height, width); boxes are (x0, y0, x1, y1) with x1 and y1 excluded.
Pixels stay uint8 and are normalised by the model, on its device.

Only what is seen is computed: the image is cropped and resized in one step, and each instance is resized inside its own
box, so time and memory follow the objects' area and overlapping instances stay apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image

from m2f_trainer.data import rle
from m2f_trainer.data.images import ImageSource, open_image
from m2f_trainer.data.views import Size, View, see_image, see_mask


class Sample(TypedDict):
    """One image ready for `collate`, all in the padded frame (H, W) but for the two sizes."""

    pixel_values: torch.Tensor  # uint8 (3, H, W), not normalised, 0 in the padding
    pixel_mask: torch.Tensor  # bool (H, W), False in the padding
    masks: list[rle.Bitmap]  # N bitmaps (y1 - y0, x1 - x0) of zeros and ones, cropped to their boxes
    boxes: torch.Tensor  # int32 (N, 4)
    category_ids: torch.Tensor  # int64 (N,), the annotation file's own
    image_id: int
    original_size: Size
    resized_size: Size


@dataclass(frozen=True)
class Geometry:
    """How one image lies in its padded frame."""

    original: Size
    resized: Size
    padded: Size


def fit(original: Size, padded: Size) -> Geometry:
    """The largest size of the same aspect that fits, at least one pixel a side."""
    scale = min(padded[0] / original[0], padded[1] / original[1])
    height, width = (max(1, min(limit, round(side * scale))) for side, limit in zip(original, padded, strict=True))
    return Geometry(original, (height, width), padded)


class EvalTransform:
    """Resize and pad, nothing random: serves evaluation, prediction and export."""

    def __init__(self, image_height: int, image_width: int) -> None:
        self.size: Size = (image_height, image_width)

    def __call__(self, row: Mapping[str, Any], epoch: int = 0, index: int = 0) -> Sample:
        """A sample of one row; `epoch` and `index` are there for `TrainTransform`'s sake.

        Raises:
            ImageError: the image can't be read or isn't of the row's size
        """
        original = (row["height"], row["width"])
        image = open_image(row["image"], describe(row), size=original)
        return make_sample(image, row, _whole(fit(original, self.size)), self.size)

    def prepare(self, image: ImageSource, where: str = "image") -> tuple[torch.Tensor, torch.Tensor, Geometry]:
        """One image of any size alone: pixel_values uint8 (3, H, W), pixel_mask bool (H, W), and where it lies.

        Raises:
            ImageError: the image can't be read
        """
        opened = open_image(image, where)
        geometry = fit((opened.height, opened.width), self.size)
        return *_pad(see_image(opened, _whole(geometry)), False, self.size), geometry


class TrainTransform:
    """Large-scale jitter with crop, mirroring and colour jitter, each a function of (seed, epoch, index) alone.

    As the original Mask2Former's instance recipe: the image is resized by a factor of `lsj_min_scale` to
    `lsj_max_scale` of the size that fits, then cropped or padded to the recipe's size (Ghiasi et al., 2021).
    """

    def __init__(
        self,
        image_height: int,
        image_width: int,
        *,
        lsj_min_scale: float = 0.1,
        lsj_max_scale: float = 2.0,
        flip: bool = True,
        color_jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.size: Size = (image_height, image_width)
        self.scales = (lsj_min_scale, lsj_max_scale)
        self.flip = flip
        self.color_jitter = color_jitter
        self.seed = seed

    def __call__(self, row: Mapping[str, Any], epoch: int = 0, index: int = 0) -> Sample:
        """The sample that image `index` is in epoch `epoch`.

        Raises:
            ImageError: the image can't be read or isn't of the row's size
        """
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, index]))
        original = (row["height"], row["width"])
        view = self.draw_view(original, rng)
        colors = draw_colors(self.color_jitter, rng)
        image = open_image(row["image"], describe(row), size=original, shrink_to=view.resized)
        return make_sample(image, row, view, self.size, colors)

    def draw_view(self, original: Size, rng: np.random.Generator) -> View:
        """A random scale, crop and mirroring."""
        factor = rng.uniform(*self.scales)
        target = (max(1, round(self.size[0] * factor)), max(1, round(self.size[1] * factor)))
        height, width = fit(original, target).resized
        y0 = int(rng.integers(max(0, height - self.size[0]) + 1))
        x0 = int(rng.integers(max(0, width - self.size[1]) + 1))
        window = (x0, y0, min(width, x0 + self.size[1]), min(height, y0 + self.size[0]))
        return View(original, (height, width), window, bool(rng.random() < 0.5) and self.flip)


def make_sample(
    image: Image.Image, row: Mapping[str, Any], view: View, size: Size, colors: tuple[float, ...] | None = None
) -> Sample:
    """The sample that shows `view` of a row's image; crowd regions and instances out of view are left out."""
    objects = [entry for entry in row.get("objects", ()) if not entry["iscrowd"]]
    looks = ((entry["category_id"], see_mask(entry["counts"], view)) for entry in objects)
    seen = [(category, *look) for category, look in looks if look is not None]
    pixel_values, pixel_mask = _pad(see_image(image, view, colors), view.flip, size)
    return Sample(
        pixel_values=pixel_values,
        pixel_mask=pixel_mask,
        masks=[bitmap for _, _, bitmap in seen],
        boxes=torch.tensor([box for _, box, _ in seen], dtype=torch.int32).reshape(-1, 4),
        category_ids=torch.tensor([category for category, _, _ in seen], dtype=torch.int64),
        image_id=row["image_id"],
        original_size=view.original,
        resized_size=view.resized,
    )


def _whole(geometry: Geometry) -> View:
    return View(geometry.original, geometry.resized, (0, 0, geometry.resized[1], geometry.resized[0]))


def describe(row: Mapping[str, Any]) -> str:
    """A row's name in messages."""
    image = row["image"]
    path = image.get("path") if isinstance(image, Mapping) else None
    return f"image {row['image_id']}" + (f" ({path})" if path else "")


def _pad(image: Image.Image, flip: bool, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (3, H, W) and bool (H, W): the image in the top left corner of the padded frame."""
    pixels = np.asarray(image)  # (h, w, 3)
    height, width = pixels.shape[:2]
    values = np.zeros((3, *size), dtype=np.uint8)
    values[:, :height, :width] = (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)
    valid = np.zeros(size, dtype=np.bool_)
    valid[:height, :width] = True
    return torch.from_numpy(values), torch.from_numpy(valid)


def draw_colors(strength: float, rng: np.random.Generator) -> tuple[float, ...] | None:
    """One affine map of RGB, rows of (r, g, b, 1): saturation, then contrast about mid-grey, then brightness."""
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, size=3)
    if not strength:
        return None
    grey = np.tile([0.299, 0.587, 0.114], (3, 1))  # ITU-R 601 luma
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey)  # (3, 3)
    offset = np.full((3, 1), brightness * (1 - contrast) * 127.5)
    return tuple(np.concatenate([matrix, offset], axis=1).reshape(-1).tolist())  # (12,)
