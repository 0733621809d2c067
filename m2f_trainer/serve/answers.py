"""The instances of one image as an answer: COCO results, polygons, or a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

from PIL import Image

from m2f_trainer.config.arguments import PixelRange
from m2f_trainer.data.images import check_pixels, open_image, open_stored
from m2f_trainer.errors import ImageError
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predict import LARGEST_PICTURE
from m2f_trainer.inference.results import polygons_of, record_of

Format: TypeAlias = Literal["coco", "polygons", "overlay"]

JPEG_SIDE = 65_500
"""The longest side, in pixels, of a JPEG that libjpeg writes."""

NAME = "the image"
"""What messages call an image, which has no file name."""


def check_image(content: bytes, overlay: bool = False) -> None:
    """Check an image file by its header, before it waits for the model.

    Args:
        content: the bytes of the file.
        overlay: a picture of it will be drawn, which is limited to `LARGEST_PICTURE` pixels and to `JPEG_SIDE`.

    Raises:
        ImageError: it is not of a known format, or has too many pixels, or a side is too long for the picture.
    """
    with open_stored(content, NAME) as image:
        check_pixels(image.size, NAME)
        if overlay and image.width * image.height > LARGEST_PICTURE:
            raise ImageError(
                f"{NAME}: overlays are drawn of at most {LARGEST_PICTURE:,} pixels, got {image.width}x{image.height} = "
                f"{image.width * image.height:,}. Ask for format=coco or format=polygons."
            )
        if overlay and max(image.size) > JPEG_SIDE:
            raise ImageError(
                f"{NAME}: overlays are JPEG files, of at most {JPEG_SIDE:,} pixels a side, got "
                f"{image.width}x{image.height}. Ask for format=coco or format=polygons."
            )


def coco_results(instances: Instances, image_id: int) -> bytes:
    """A JSON list of COCO results, with compressed RLE masks."""
    return json.dumps(replace(instances, image_id=image_id).to_coco()).encode()


def polygon_results(instances: Instances, names: Mapping[int, str]) -> bytes:
    """A JSON object with the size of the image, and polygons, box, area, class and score of each instance.

    Polygons run along pixel edges, one for each connected part, as [x, y, x, y, ...]; they have no holes.
    """
    record = record_of(NAME, instances)
    entries = [
        {
            "category_id": entry["category_id"],
            "category": names[entry["category_id"]],
            "score": entry["score"],
            "bbox": entry["bbox"],
            "area": entry["area"],
            "polygons": polygons_of(entry["segmentation"]),
        }
        for entry in record.instances
    ]
    return json.dumps({"width": record.width, "height": record.height, "instances": entries}).encode()


def overlay_picture(
    content: bytes, instances: Instances, names: Mapping[int, str], pixel_range: PixelRange = None
) -> bytes:
    """The image with its instances drawn on it, as JPEG.

    Raises:
        ImageError: the image can't be read.
    """
    image: Image.Image = open_image(content, NAME, displayed=True, pixel_range=pixel_range)
    picture, buffer = instances.overlay(image, names), io.BytesIO()
    if picture.height > JPEG_SIDE:  # only with the legend
        picture = picture.crop((0, 0, picture.width, JPEG_SIDE))
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
