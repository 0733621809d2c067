"""Masks are drawn where they are."""

import io

import numpy as np
from PIL import Image

from m2f_trainer.doctor.pictures import draw_objects
from m2f_trainer.masks import rle
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


def test_an_object_is_drawn_at_its_place_in_a_smaller_picture():
    image = Image.new("RGB", (200, 100), "black")
    mask = np.zeros((100, 200), np.uint8)
    mask[20:80, 40:90] = 1
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask.T.flatten(), [0]]))), prepend=0)
    runs = np.append(runs, mask.size - runs.sum())
    counts = rle.write_counts(runs, 100, 200)
    drawn = np.asarray(draw_objects({"path": None, "bytes": _png(image)}, [{"counts": counts}] * 2, 100)).any(axis=2)
    assert drawn[10:40, 20:45].all()
    assert drawn.sum() == 30 * 25
