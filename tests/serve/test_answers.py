"""Answers about one image."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.errors import ImageError
from m2f_trainer.inference.instances import Instances
from m2f_trainer.masks.segmentation import encode
from m2f_trainer.serve.answers import check_image, coco_results, overlay_picture, polygon_results


def rectangle() -> Instances:
    """One instance: columns 1 and 2 of rows 1 to 3, of an image of 6 x 4."""
    mask = np.zeros((6, 4), np.uint8)
    mask[1:4, 1:3] = 1
    entry = {"image_id": 0, "category_id": 5, "score": 0.75, "segmentation": {"size": [6, 4], "counts": encode(mask)}}
    (instances,) = Instances.from_coco([entry])
    return instances


def photo(orientation: int = 1) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (4, 6) if orientation < 5 else (6, 4)).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def test_coco_results_have_the_number_that_was_asked_for() -> None:
    (entry,) = json.loads(coco_results(rectangle(), 17))
    assert entry == {**rectangle().to_coco()[0], "image_id": 17}


def test_polygons_are_along_the_edges_of_pixels() -> None:
    answer = json.loads(polygon_results(rectangle(), {5: "box"}))
    assert (answer["width"], answer["height"]) == (4, 6)
    (entry,) = answer["instances"]
    corners = np.reshape(entry.pop("polygons"), (-1, 2)).tolist()
    assert sorted(corners) == [[1, 1], [1, 4], [3, 1], [3, 4]]
    assert entry == {"category_id": 5, "category": "box", "score": 0.75, "bbox": [1, 1, 2, 3], "area": 6}


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_overlay_has_the_size_in_which_viewers_show_the_photo(orientation: int) -> None:
    picture = Image.open(io.BytesIO(overlay_picture(photo(orientation), rectangle(), {5: "box"})))
    assert (picture.format, picture.size) == ("JPEG", (4, 6))


def test_a_header_is_enough_to_refuse_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    check_image(photo())
    monkeypatch.setenv("M2F_MAX_PIXELS", "23")
    with pytest.raises(ImageError, match="the image: expected at most 23 pixels, got 4x6 = 24"):
        check_image(photo()[:-20])
