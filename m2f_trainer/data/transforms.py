"""Dataset rows to samples of the recipe's size: the preprocessing of evaluation, and its variant with augmentation.

Frames are those of `m2f_trainer.data.geometry`. Pixels stay uint8; the model normalises them. An image is
cropped and resized in one step, and each instance is resized inside its own box, so that time and memory are
proportional to the area of the objects, and overlapping instances stay separate.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from m2f_trainer.config.arguments import PixelRange
from m2f_trainer.data.geometry import Crop, Frames, Pixels, crop_image, crop_mask, in_crop, orient, resize_to_fit, trim
from m2f_trainer.data.images import ImageSource, open_image
from m2f_trainer.data.reading import reading_of
from m2f_trainer.masks import rle
from m2f_trainer.masks.rle import Box, Size


class Sample(TypedDict):
    """One image ready for `collate`; everything but the two sizes is in the padded frame (H, W)."""

    pixel_values: torch.Tensor  # uint8 (3, H, W), not normalised, 0 in the padding
    pixel_mask: torch.Tensor  # bool (H, W), False in the padding
    masks: list[rle.Bitmap]  # N bitmaps (y1 - y0, x1 - x0) of zeros and ones, cropped to their boxes
    boxes: torch.Tensor  # int32 (N, 4)
    category_ids: torch.Tensor  # int64 (N,), the annotation file's own
    image_id: int
    original_size: Size
    resized_size: Size
    tile: NotRequired[tuple[int, int, int]]  # of `tiles.EvalTiles`: the tile's number, the image's height and width


def paste_instances(sample: Sample, other: Sample, chosen: npt.NDArray[np.bool_]) -> Sample:
    """Simple copy-paste (Ghiasi et al., 2021): the `chosen` (N,) instances of `other` are pasted on the sample.

    Pixels that they cover are removed from the sample's own instances; nothing is pasted into the padding.
    """
    valid = sample["pixel_mask"].numpy()
    pixels = sample["pixel_values"].clone()
    top = np.zeros(valid.shape, dtype=np.bool_)
    pasted: list[tuple[int, Box, rle.Bitmap]] = []
    for k in np.flatnonzero(chosen).tolist():
        x0, y0, x1, y1 = other["boxes"][k].tolist()
        visible = trim((other["masks"][k] != 0) & valid[y0:y1, x0:x1], (x0, y0, x1, y1))
        if visible is not None:
            top[y0:y1, x0:x1] |= (other["masks"][k] != 0) & valid[y0:y1, x0:x1]
            pasted.append((int(other["category_ids"][k]), *visible))
    if not pasted:
        return sample
    covered = torch.from_numpy(top)
    pixels[:, covered] = other["pixel_values"][:, covered]
    below = []
    for category, (x0, y0, x1, y1), bitmap in _instances(sample):
        left = trim((bitmap != 0) & ~top[y0:y1, x0:x1], (x0, y0, x1, y1))
        if left is not None:
            below.append((category, *left))
    return _with_instances({**sample, "pixel_values": pixels}, [*below, *pasted])


def drop_small(area: int, sample: Sample) -> Sample:
    """The sample without instances of fewer than `area` pixels."""
    large = [one for one in _instances(sample) if int(one[2].sum()) >= area]
    return sample if len(large) == len(sample["masks"]) else _with_instances(sample, large)


def _instances(sample: Sample) -> list[tuple[int, Box, rle.Bitmap]]:
    boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in sample["boxes"].tolist()]
    return list(zip(sample["category_ids"].tolist(), boxes, sample["masks"], strict=True))


def _with_instances(sample: Sample, instances: Iterable[tuple[int, Box, rle.Bitmap]]) -> Sample:
    found = list(instances)
    return {
        **sample,
        "masks": [bitmap for _, _, bitmap in found],
        "boxes": torch.tensor([box for _, box, _ in found], dtype=torch.int32).reshape(-1, 4),
        "category_ids": torch.tensor([category for category, _, _ in found], dtype=torch.int64),
    }


Row: TypeAlias = Mapping[str, Any]


class EvalTransform:
    """Resize and pad without augmentation, for evaluation, prediction and export."""

    def __init__(self, image_height: int, image_width: int, pixel_range: PixelRange = None) -> None:
        """`pixel_range` is that of `prepare`; rows have their own."""
        self.size: Size = (image_height, image_width)
        self.pixel_range = pixel_range

    def __call__(self, row: Row, epoch: int = 0, index: int = 0, rows: Sequence[Row] = ()) -> Sample:
        """The sample of one row; `epoch`, `index` and `rows`, which `TrainTransform` uses, are ignored.

        Raises:
            ImageError: the image can't be read or isn't of the row's size
        """
        frames = resize_to_fit((row["height"], row["width"]), self.size)
        return make_sample(read_image(row), row, _whole(frames), self.size)

    def prepare(self, image: ImageSource, where: str = "image") -> tuple[torch.Tensor, torch.Tensor, Frames]:
        """One image without annotations: pixel_values uint8 (3, H, W), pixel_mask bool (H, W), and its frames.

        Raises:
            ImageError: the image can't be read
        """
        opened = open_image(image, where, displayed=True, pixel_range=self.pixel_range)
        frames = resize_to_fit((opened.height, opened.width), self.size)
        crop = _whole(frames)
        return *pad(crop_image(opened, crop), crop, self.size), frames


class TrainTransform:
    """Large-scale jitter with random crops, flips, quarter turns, colour jitter and copy-paste.

    As in the original Mask2Former's recipe for instances, the image is resized by a random factor from `lsj_min_scale`
    to `lsj_max_scale` of the size that fits, then cropped or padded to the recipe's size (Ghiasi et al., 2021).
    A sample is a function of (seed, epoch, index) alone.
    """

    def __init__(
        self,
        image_height: int,
        image_width: int,
        *,
        lsj_min_scale: float = 0.1,
        lsj_max_scale: float = 2.0,
        flip: bool = True,
        rotate90: bool = False,
        color_jitter: float = 0.0,
        copy_paste: float = 0.0,
        min_area: int = 1,
        seed: int = 0,
    ) -> None:
        """`copy_paste` is the probability of pasting instances of another image; `min_area` is in input pixels."""
        self.size: Size = (image_height, image_width)
        self.scales = (lsj_min_scale, lsj_max_scale)
        self.flip, self.rotate90 = flip, rotate90
        self.color_jitter, self.copy_paste = color_jitter, copy_paste
        self.min_area = min_area
        self.seed = seed

    def __call__(self, row: Row, epoch: int = 0, index: int = 0, rows: Sequence[Row] = ()) -> Sample:
        """The sample of `row`, which is number `index` of `rows`, in an epoch; copy-paste needs `rows`.

        Raises:
            ImageError: an image can't be read or isn't of its row's size
        """
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, index]))
        sample = self.random_sample(row, epoch, rng)
        if len(rows) and rng.random() < self.copy_paste:
            other = self.random_sample(rows[int(rng.integers(len(rows)))], epoch, rng)
            sample = paste_instances(sample, other, rng.random(len(other["masks"])) < 0.5)
        return drop_small(self.min_area, sample)

    def random_sample(self, row: Row, epoch: int, rng: np.random.Generator) -> Sample:
        """One image with a random crop and random colours, before copy-paste."""
        crop = self.random_crop(row, epoch, rng)
        colors = random_colors(self.color_jitter, rng)
        return make_sample(self.read(row, crop), row, crop, self.size, colors, fast=True)

    def read(self, row: Row, crop: Crop) -> Image.Image:
        """The row's image, in which the crop will be made."""
        return read_image(row, shrink_to=crop.resized)

    def random_crop(self, row: Row, epoch: int, rng: np.random.Generator) -> Crop:
        """A random scale, window, flip and rotation."""
        original = (row["height"], row["width"])
        quarter_turns = int(rng.integers(4)) if self.rotate90 else 0
        size = self.size[::-1] if quarter_turns % 2 else self.size  # the frame before the rotation
        factor = rng.uniform(*self.scales)
        target = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
        height, width = resize_to_fit(original, target).resized
        y0 = int(rng.integers(max(0, height - size[0]) + 1))
        x0 = int(rng.integers(max(0, width - size[1]) + 1))
        window = (x0, y0, min(width, x0 + size[1]), min(height, y0 + size[0]))
        return Crop(original, (height, width), window, bool(rng.random() < 0.5) and self.flip, quarter_turns)


def make_sample(
    image: Image.Image,
    row: Row,
    crop: Crop,
    size: Size,
    colors: tuple[float, ...] | None = None,
    fast: bool = False,
) -> Sample:
    """The sample of a crop of a row's image, without crowd regions and instances outside the crop."""
    near = in_crop(target_boxes(row), crop).tolist()  # reading a mask costs as much as cropping it
    objects = [entry for entry, meets in zip(targets(row), near, strict=True) if meets]
    cropped = ((entry["category_id"], crop_mask(entry["counts"], crop)) for entry in objects)
    visible = [(category, *found) for category, found in cropped if found is not None]
    pixel_values, pixel_mask = pad(crop_image(image, crop, colors, fast), crop, size)
    return Sample(
        pixel_values=pixel_values,
        pixel_mask=pixel_mask,
        masks=[bitmap for _, _, bitmap in visible],
        boxes=torch.tensor([box for _, box, _ in visible], dtype=torch.int32).reshape(-1, 4),
        category_ids=torch.tensor([category for category, _, _ in visible], dtype=torch.int64),
        image_id=row["image_id"],
        original_size=crop.original,
        resized_size=crop.resized,
    )


def targets(row: Row) -> list[Mapping[str, Any]]:
    """The objects of a row that are trained on: all but crowd regions."""
    return [entry for entry in row.get("objects", ()) if not entry["iscrowd"]]


def target_boxes(row: Row) -> npt.NDArray[np.float64]:
    """The boxes (N, 4) of a row's targets, from their masks: x0, y0, x1, y1 in the original frame."""
    size = [row["height"], row["width"]]
    encoded = [{"size": size, "counts": one["counts"]} for one in targets(row)]
    boxes = np.asarray(coco_mask.toBbox(encoded), np.float64).reshape(-1, 4) if encoded else np.zeros((0, 4))
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _whole(frames: Frames) -> Crop:
    return Crop(frames.original, frames.resized, (0, 0, frames.resized[1], frames.resized[0]))


def read_image(row: Row, shrink_to: Size | None = None) -> Image.Image:
    """The image of a row, of at least `shrink_to`. Raises ImageError if it can't be read or isn't of the row's size."""
    reading = reading_of(row)
    return open_image(
        row["image"],
        image_name(row),
        size=(row["height"], row["width"]),
        shrink_to=shrink_to,
        displayed=reading.displayed,
        pixel_range=reading.pixel_range,
    )


def image_name(row: Row) -> str:
    """The image of a row in messages."""
    image = row["image"]
    path = image.get("path") if isinstance(image, Mapping) else None
    return f"image {row['image_id']}" + (f" ({path})" if path else "")


def pad(pixels: Pixels, crop: Crop, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels in the top left corner of the padded frame, uint8 (3, H, W), and their mask, bool (H, W)."""
    pixels = orient(pixels, crop)  # (h, w, 3)
    height, width = pixels.shape[:2]
    values = np.zeros((3, *size), dtype=np.uint8)
    for channel in range(3):  # a third of the time of a transposed copy
        values[channel, :height, :width] = pixels[:, :, channel]
    valid = np.zeros(size, dtype=np.bool_)
    valid[:height, :width] = True
    return torch.from_numpy(values), torch.from_numpy(valid)


def random_colors(strength: float, rng: np.random.Generator) -> tuple[float, ...] | None:
    """An affine map of RGB, three rows of coefficients of (r, g, b, 1): saturation, contrast, then brightness."""
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, size=3)
    if not strength:
        return None
    grey = np.tile([0.299, 0.587, 0.114], (3, 1))  # ITU-R 601 luma
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey)  # (3, 3)
    offset = np.full((3, 1), brightness * (1 - contrast) * 127.5)
    return tuple(np.concatenate([matrix, offset], axis=1).reshape(-1).tolist())  # (12,)
