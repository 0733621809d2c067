"""Boxes and runs of masks equal those of the dense bitmaps and of pycocotools."""

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from m2f_trainer.masks import rle
from m2f_trainer.masks import segmentation as masks

Bitmap = NDArray[np.uint8]


def random_masks(count: int = 30) -> list[Bitmap]:
    """Masks of many sizes, from empty to full."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 30, (count, 2)).tolist()
    return [(rng.random(size) < rng.random()).astype(np.uint8) for size in sizes] + [np.zeros((4, 5), np.uint8)]


def filled(box: rle.Box) -> NDArray[np.bool_]:
    x0, y0, x1, y1 = box
    dense = np.zeros((20, 20), np.bool_)
    dense[y0:y1, x0:x1] = True
    return dense


def test_intersection_and_union_of_boxes_are_those_of_their_pixels() -> None:
    corners = np.sort(np.random.default_rng(0).integers(0, 20, (200, 2, 2, 2)), axis=2)  # pair, box, corner, (x, y)
    for first, second in corners.tolist():
        one, other = ((x0, y0, x1 + 1, y1 + 1) for (x0, y0), (x1, y1) in (first, second))
        shared = filled(one) & filled(other)
        assert rle.box_area(rle.intersection(one, other)) == shared.sum()
        assert np.array_equal(filled(rle.intersection(one, other)), shared)
        ys, xs = np.nonzero(filled(one) | filled(other))
        assert rle.union([one, other]) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_area_box_and_any_part_of_a_mask_are_those_of_its_bitmap() -> None:
    for bitmap in random_masks():
        height, width = bitmap.shape
        runs = rle.read_runs(masks.encode(bitmap), height, width)
        encoded = coco_mask.encode(np.asfortranarray(bitmap))
        x, y, w, h = coco_mask.toBbox(encoded).tolist()
        assert rle.area(runs) == bitmap.sum() == coco_mask.area(encoded)
        assert rle.box_of(runs, height) == (x, y, x + w, y + h)
        part = (width // 3, height // 3, width, height)
        assert np.array_equal(rle.paint(runs, part, height), bitmap[height // 3 :, width // 3 :])


def test_areas_of_any_number_of_masks_are_those_of_their_bitmaps() -> None:
    bitmaps = random_masks(600)
    assert rle.areas([coco_mask.encode(np.asfortranarray(one)) for one in bitmaps]) == [one.sum() for one in bitmaps]
    assert rle.areas([]) == []


def test_runs_of_changes_and_of_a_compressed_rle_are_the_same() -> None:
    for bitmap in random_masks():
        flat = np.concatenate([[0], bitmap.T.reshape(-1), [0]])
        changes = np.flatnonzero(flat[1:] != flat[:-1])
        runs = rle.runs_of_changes(changes, bitmap.size)
        assert runs.tolist() == rle.read_runs(masks.encode(bitmap), *bitmap.shape).tolist()
        assert rle.encode_runs([runs])[0].decode() == rle.write_counts(runs, *bitmap.shape) == masks.encode(bitmap)


@pytest.mark.parametrize("value", ["x" * 500, list(range(500)), {"a": 1}, 10**300, b"\xff" * 500, None])
def test_values_in_messages_are_short(value: object) -> None:
    assert len(rle.brief(value)) <= 64
