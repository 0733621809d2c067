"""Masks equal pycocotools' on everything valid, and everything else is refused before its C code is reached."""

import math
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from m2f_trainer.errors import MaskError
from m2f_trainer.masks import rle
from m2f_trainer.masks import segmentation as masks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools


def official(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """pycocotools' COCO.annToRLE."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return coco_mask.frPyObjects(segmentation, height, width)


def random_bitmap(rng: np.random.Generator) -> np.ndarray:
    height, width = rng.integers(1, 40, size=2)
    return (rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 0.98, 1.0])).astype(np.uint8)


def test_polygons_give_the_very_counts_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(side) for side in rng.integers(1, 60, size=2))
        polygons = [
            (rng.uniform(-0.3, 1.3, size=(int(rng.integers(3, 9)), 2)) * [width, height]).reshape(-1).tolist()
            for _ in range(int(rng.integers(1, 4)))
        ]
        counts = masks.to_counts(polygons, height, width, "test")
        expected = official(polygons, height, width)
        assert counts.encode() == expected["counts"]
        assert np.array_equal(masks.decode(counts, height, width), coco_mask.decode(expected))


def test_bitmaps_come_back_from_compressed_and_uncompressed_rle():
    rng = np.random.default_rng(1)
    for _ in range(500):
        bitmap = random_bitmap(rng)
        height, width = bitmap.shape
        counts = masks.encode(bitmap)
        runs = rle.read_runs(counts, height, width)
        for form in (counts, counts.encode(), runs.tolist()):
            assert masks.to_counts({"size": [height, width], "counts": form}, height, width, "test") == counts
        assert np.array_equal(masks.decode(counts, height, width), bitmap)
        assert rle.area(runs) == bitmap.sum()


def test_the_box_and_any_part_of_a_mask_equal_those_of_the_whole():
    rng = np.random.default_rng(2)
    for _ in range(500):
        bitmap = random_bitmap(rng)
        height, width = bitmap.shape
        runs = rle.read_runs(masks.encode(bitmap), height, width)
        x0, y0, x1, y1 = rle.box_of(runs, height)
        encoded = coco_mask.encode(np.asfortranarray(bitmap))
        if bitmap.any():
            rows, columns = np.nonzero(bitmap)
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert [x0, y0, x1 - x0, y1 - y0] == coco_mask.toBbox(encoded).tolist()
        left, right = sorted(rng.integers(0, width + 1, size=2).tolist())
        top, bottom = sorted(rng.integers(0, height + 1, size=2).tolist())
        part = rle.paint(runs, (left, top, right, bottom), height)
        assert np.array_equal(part, bitmap[top:bottom, left:right])


@pytest.mark.parametrize(
    "runs", [[0, 0, 0, 12], [3, 0, 9], [0, 4, 0, 8], [3, 2, 0, 0, 0, 3, 4], [12, 0], [2, 0, 0, 0, 10]]
)
def test_empty_runs_are_merged_away_and_decode_as_in_pycocotools(runs):
    counts = masks.to_counts({"size": [3, 4], "counts": runs}, 3, 4, "test")
    expected = coco_mask.decode(coco_mask.frPyObjects({"size": [3, 4], "counts": runs}, 3, 4))
    assert np.array_equal(masks.decode(counts, 3, 4), expected)
    assert rle.read_runs(counts, 3, 4)[1:].all()
    assert coco_mask.area(coco_mask.merge([{"size": [3, 4], "counts": counts.encode()}] * 2)) == expected.sum()


BAD = {
    "null": (None, "expected polygons"),
    "text": ("0 1 2", "expected polygons"),
    "empty": ([], "segmentation is empty"),
    "a part that is no list": ([3, 4, 5, 6, 7, 8], "expected a list of numbers"),
    "nested pairs": ([[[1, 2], [3, 4], [5, 6]]], "expected numbers"),
    "text numbers": ([["1", 2, 3, 4, 5, 6]], "expected numbers"),
    "null number": ([[None, 2, 3, 4, 5, 6]], "expected numbers"),
    "booleans": ([[True, 2, 3, 4, 5, 6]], "expected numbers"),
    "two points": ([[1, 2, 3, 4]], "at least three points"),
    "odd length": ([[1, 2, 3, 4, 5, 6, 7]], "at least three points"),
    "empty part": ([[]], "at least three points"),
    "NaN first": ([[math.nan, 2, 3, 4, 5, 6]], "got nan"),
    "NaN later": ([[1, 2, 3, math.nan, 5, 6]], "got nan"),
    "infinite": ([[1, 2, 3, -math.inf, 5, 6]], "got -inf"),
    "far out": ([[1, 2, 3, 1e8, 5, 6]], "within 10 sides"),
    "huge integer": ([[1, 2, 3, 10**400, 5, 6]], "within 10 sides"),
    "endless outline": ([[-9, 0, 200, 0] * 30_000], "boundary is"),
    "no counts": ({"size": [16, 20]}, "expected RLE counts"),
    "no size": ({"counts": [320]}, r"\[16, 20\]"),
    "turned size": ({"size": [20, 16], "counts": [320]}, r"\[20, 16\]"),
    "short": ({"size": [16, 20], "counts": [319]}, "add up to 16 x 20 = 320 pixels, got 319"),
    "long": ({"size": [16, 20], "counts": [320, 1]}, "got 321"),
    "negative": ({"size": [16, 20], "counts": [330, -10]}, "got -10"),
    "fractions": ({"size": [16, 20], "counts": [320.0]}, "got 320.0"),
    "boolean count": ({"size": [16, 20], "counts": [True, 319]}, "got True"),
    "huge count": ({"size": [16, 20], "counts": [2**70]}, "whole numbers"),
    "no run": ({"size": [16, 20], "counts": []}, "got 0"),
    "empty string": ({"size": [16, 20], "counts": ""}, "expected a compressed RLE"),
    "foreign letters": ({"size": [16, 20], "counts": "ééé"}, "expected a compressed RLE"),
    "NUL": ({"size": [16, 20], "counts": "P:\0"}, "expected a compressed RLE"),
    "cut string": ({"size": [16, 20], "counts": "P"}, "truncated"),
    "endless number": ({"size": [16, 20], "counts": "o" * 40 + "0"}, "truncated or damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_mask_is_refused_with_its_place(name):
    segmentation, message = BAD[name]
    with pytest.raises(MaskError, match=message) as error:
        masks.to_counts(segmentation, 16, 20, "file.json: annotation 7")
    assert str(error.value).startswith("file.json: annotation 7")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (200_000, 200_000), (2**32 + 4, 1)])
def test_sizes_that_crash_pycocotools_are_refused(size):
    with pytest.raises(MaskError, match="expected an image of 1 to"):
        masks.decode("0", *size)


def test_damaged_strings_never_decode_to_anything_but_their_image():
    rng = np.random.default_rng(3)
    good = masks.encode((rng.random((30, 30)) < 0.3).astype(np.uint8))
    accepted = 0
    for _ in range(3000):
        letters = list(good)
        for place in rng.integers(len(letters), size=int(rng.integers(1, 4))):
            letters[place] = chr(int(rng.integers(1, 127)))
        damaged = "".join(letters)[: int(rng.integers(1, len(letters) + 1)) if rng.random() < 0.3 else None]
        try:
            mask = masks.decode(damaged, 30, 30)
        except MaskError:
            continue
        accepted += 1
        assert np.array_equal(mask, coco_mask.decode({"size": [30, 30], "counts": damaged.encode()}))
    assert accepted
