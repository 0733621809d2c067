"""Every image mode comes out with masks on their pixels, checked by drawing, or is refused with advice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.transforms import EvalTransform, TrainTransform
from m2f_trainer.errors import ImageError
from m2f_trainer.masks import segmentation as masks
from tests.data.test_transforms import whole

SHAPE = np.zeros((60, 90), dtype=np.uint8)
SHAPE[8:30, 12:50] = 1  # bright where the mask is; no turn or mirror image of itself
SHAPE[30:52, 12:24] = 1
GREY = np.where(SHAPE == 1, 230, 20).astype(np.uint8)


def colours(mode: str) -> Image.Image:
    return Image.fromarray(GREY).convert("RGB").convert(mode)


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(GREY).convert(mode)
    image.putalpha(Image.fromarray(np.where(SHAPE == 1, 0, 255).astype(np.uint8)))  # the object is invisible
    return image


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


Maker = Callable[[], Image.Image]
DEEP = GREY.astype(np.uint16) * 257
GOOD: dict[str, tuple[Maker, str, dict[str, Any]]] = {
    "1-bit png": (lambda: Image.fromarray(GREY).point(lambda v: 255 * (v > 99)).convert("1"), "png", {}),
    "1-bit tiff": (lambda: Image.fromarray(GREY).point(lambda v: 255 * (v > 99)).convert("1"), "tif", {}),
    "grey png": (lambda: colours("L"), "png", {}),
    "grey jpeg": (lambda: colours("L"), "jpg", {"quality": 95}),
    "grey with alpha": (lambda: with_alpha("L"), "png", {}),
    "palette png": (lambda: colours("P"), "png", {}),
    "palette with transparency": (lambda: colours("P"), "png", {"transparency": 0}),
    "palette gif": (lambda: colours("P"), "gif", {}),
    "animated gif": (lambda: colours("L"), "gif", {"save_all": True, "append_images": [Image.new("L", (90, 60), 99)]}),
    "animated webp": (
        lambda: colours("RGB"),
        "webp",
        {"save_all": True, "append_images": [Image.new("RGB", (90, 60), "red")]},
    ),
    "tiff with a small copy": (
        lambda: colours("L"),
        "tif",
        {"save_all": True, "append_images": [Image.new("L", (9, 6))]},
    ),
    "rgb png": (lambda: colours("RGB"), "png", {}),
    "rgb with a transparent colour": (lambda: colours("RGB"), "png", {"transparency": (20, 20, 20)}),
    "rgb bmp": (lambda: colours("RGB"), "bmp", {}),
    "rgb webp": (lambda: colours("RGB"), "webp", {"lossless": True}),
    "rgb tiff": (lambda: colours("RGB"), "tif", {"compression": "tiff_lzw"}),
    "rgb ppm": (lambda: colours("RGB"), "ppm", {}),
    "rgba png": (lambda: with_alpha("RGB"), "png", {}),
    "cmyk jpeg": (lambda: colours("CMYK"), "jpg", {"quality": 95}),
    "cmyk tiff": (lambda: colours("CMYK"), "tif", {}),
    "ycbcr jpeg": (lambda: colours("YCbCr"), "jpg", {"quality": 95}),
    "progressive jpeg": (lambda: colours("RGB"), "jpg", {"progressive": True, "quality": 95}),
    "16-bit png": (lambda: Image.fromarray(DEEP), "png", {}),
    "16-bit tiff": (lambda: Image.fromarray(DEEP), "tif", {}),
    "big-endian 16-bit tiff": (lambda: Image.fromarray(DEEP.astype(">u2")), "tif", {}),
    "32-bit tiff of 16-bit values": (lambda: Image.fromarray(DEEP.astype(np.int32)), "tif", {}),
    **{f"exif {k} jpeg": (lambda: colours("RGB"), "jpg", {"quality": 95, **turned(k)}) for k in range(1, 9)},
    **{f"exif {k} png": (lambda: colours("RGB"), "png", turned(k)) for k in range(1, 9)},
}
BAD: dict[str, tuple[Maker, str]] = {
    "float tiff": (lambda: Image.fromarray(GREY / np.float32(255)), "tif"),
    "32-bit tiff": (lambda: Image.fromarray(GREY.astype(np.int32) * 1000), "tif"),
    "lab tiff": (lambda: Image.new("LAB", (90, 60)), "tif"),
}


def row_of(path: Path) -> dict[str, Any]:
    one = {"id": 1, "category_id": 1, "iscrowd": False, "counts": masks.encode(SHAPE)}
    return {"image": {"path": str(path), "bytes": None}, "image_id": 1, "height": 60, "width": 90, "objects": [one]}


@pytest.mark.parametrize("name", GOOD)
def test_the_mask_lies_on_the_bright_pixels_of_every_mode(name, tmp_path):
    make, suffix, options = GOOD[name]
    path = tmp_path / f"a.{suffix}"
    make().save(path, **options)
    drawn = [
        TrainTransform(96, 96, lsj_min_scale=0.7, lsj_max_scale=1.4, rotate90=True)(row_of(path), 0, k)
        for k in range(6)
    ]
    for sample in [EvalTransform(60, 90)(row_of(path)), *drawn]:
        bright = sample["pixel_values"].float().mean(dim=0).numpy() > 125
        mask = whole(sample, 0) != 0
        assert (bright != mask).sum() <= 0.06 * max(1, mask.sum())


@pytest.mark.parametrize("name", BAD)
def test_a_mode_without_one_right_conversion_is_refused_with_advice(name, tmp_path):
    make, suffix = BAD[name]
    make().save(tmp_path / f"a.{suffix}")
    with pytest.raises(ImageError, match=r"image 1 .*(Convert|pixel_range)"):
        EvalTransform(60, 90)(row_of(tmp_path / f"a.{suffix}"))
