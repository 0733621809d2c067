"""Masks are drawn where they are."""

import io

import numpy as np
from PIL import Image

from m2f_trainer.doctor.pictures import draw_objects
from m2f_trainer.viz.overlay import Shape, draw_shapes


def test_masks_are_drawn_where_they_are():
    image = Image.new("RGB", (20, 10), "black")
    drawn = np.asarray(draw_shapes(image, [Shape((4, 2, 9, 8), np.ones((6, 5), dtype=np.uint8), (255, 0, 0))]))
    lit = drawn.any(axis=2)
    assert lit[2:8, 4:9].all()
    assert lit.sum() == 30
    assert np.asarray(draw_objects({"path": None, "bytes": _png(image)}, [], 10)).shape == (5, 10, 3)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
