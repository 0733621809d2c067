"""Random and damaged masks: valid ones decode exactly as by pycocotools, the rest is refused."""

import random

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from m2f_trainer.errors import MaskError
from m2f_trainer.masks import rle
from m2f_trainer.masks import segmentation as masks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
ODD = [None, "3", True, float("nan"), float("inf"), -1e9, 1e9, [1], 10**30]


def random_bitmap(rng: np.random.Generator) -> np.ndarray:
    height, width = rng.integers(1, 40, size=2)
    return (rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])).astype(np.uint8)


def check_rle(number: int) -> bool:
    """Damages the counts of a random mask; whether the result is still valid."""
    rng = np.random.default_rng([1, number])
    bitmap = random_bitmap(rng)
    height, width = bitmap.shape
    counts = bytearray(masks.encode(bitmap).encode())
    for _ in range(int(rng.integers(0, 4))):
        place = int(rng.integers(len(counts) + 1))
        action = rng.integers(4)
        if action == 0 and place < len(counts):
            counts[place] = int(rng.integers(256))
        elif action == 1:
            counts.insert(place, int(rng.integers(48, 112)))
        elif action == 2:
            del counts[place : place + int(rng.integers(1, 4))]
        elif place < len(counts):
            counts[place] ^= 1 << int(rng.integers(6))
    try:
        decoded = masks.decode(bytes(counts), height, width)
        clean = masks.to_counts({"size": [height, width], "counts": bytes(counts)}, height, width, "fuzz")
    except MaskError:
        return False
    official = {"size": [height, width], "counts": clean.encode()}
    assert np.array_equal(decoded, coco_mask.decode(official))
    assert np.array_equal(decoded, coco_mask.decode({**official, "counts": bytes(counts)}))
    assert int(coco_mask.area(official)) == rle.area(rle.read_runs(clean, height, width))
    assert np.array_equal(coco_mask.decode(coco_mask.merge([official, official])), decoded)
    return True


def check_polygon(number: int) -> bool:
    """Draws random polygons, a third of them with something odd inside; whether they were valid."""
    dice = random.Random(number)
    height, width = dice.randint(1, 60), dice.randint(1, 60)
    reach = dice.choice([1.0, 1.5, 8.0])
    parts = []
    for _ in range(dice.randint(1, 3)):
        points = dice.randint(2, 9)
        part: list[object] = [dice.uniform(-reach, reach) * max(height, width) for _ in range(2 * points)]
        if dice.random() < 0.3:
            part = [round(value) for value in part]
        parts.append(part)
    if dice.random() < 0.3:
        part = dice.choice(parts)
        part[dice.randrange(len(part))] = dice.choice(ODD)
    if dice.random() < 0.1:
        dice.choice(parts).pop()
    try:
        counts = masks.to_counts(parts, height, width, "fuzz")
    except MaskError:
        return False
    official = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, height, width)))
    assert np.array_equal(masks.decode(counts, height, width), official)
    return True


@pytest.mark.parametrize("check", [check_rle, check_polygon])
def test_five_thousand_random_masks_decode_as_pycocotools_or_are_refused(check):
    valid = sum(check(number) for number in range(2500))
    assert 250 < valid < 2250


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_rle, check_polygon])
def test_a_hundred_thousand_random_masks_decode_as_pycocotools_or_are_refused(check):
    valid = sum(check(number) for number in range(50_000))
    assert 5_000 < valid < 45_000
