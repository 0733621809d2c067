"""Pictures show every instance and leave the image alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from m2f_trainer.inference.instances import Instances
from m2f_trainer.viz.overlay import colour, draw_instances
from tests.evaluation.truth import instances_from


def two_squares() -> Instances:
    masks = np.zeros((2, 120, 160), np.uint8)
    masks[0, 30:80, 20:60] = 1
    masks[1, 50:100, 40:120] = 1
    found = [(3 + k, 0.9 - k / 10, coco_mask.encode(np.asfortranarray(mask))["counts"]) for k, mask in enumerate(masks)]
    return instances_from(1, (120, 160), found)


def test_masks_are_tinted_outlined_and_labelled_on_a_copy() -> None:
    image = Image.new("RGB", (160, 120), (100, 100, 100))
    picture = np.asarray(two_squares().overlay(image, {3: "cat", 4: "dog"})).astype(int)
    assert (np.asarray(image) == 100).all()
    first, second = np.array(colour(0)), np.array(colour(1))
    assert abs(picture[65, 30] - (0.55 * 100 + 0.45 * first)).max() <= 1
    assert abs(picture[90, 100] - (0.55 * 100 + 0.45 * second)).max() <= 1
    assert (picture[79, 30] == first).all()
    assert (picture[110, 10] == 100).all()
    assert (picture[16:29, 21:60] == first).all(-1).any()


def test_a_label_never_lies_on_the_middle_of_another_object() -> None:
    masks = np.zeros((25, 100, 100), np.uint8)
    for k in range(25):
        y, x = 4 + 19 * (k // 5), 4 + 19 * (k % 5)
        masks[k, y : y + 12, x : x + 12] = 1
    found = [(1, 0.9 - k / 100, coco_mask.encode(np.asfortranarray(mask))["counts"]) for k, mask in enumerate(masks)]
    picture = np.asarray(instances_from(1, (100, 100), found).overlay(Image.new("RGB", (100, 100)), {1: "nucleus"}))
    for k in range(25):
        y, x = 10 + 19 * (k // 5), 10 + 19 * (k % 5)
        assert np.abs(picture[y, x].astype(float) - 0.45 * np.array(colour(k))).max() <= 1


@pytest.mark.parametrize(("side", "least", "most"), [(12, 9, 16), (32, 14, 24), (200, 25, 45)])
def test_a_label_is_half_as_high_as_the_objects_of_a_large_image_but_readable(side: int, least: int, most: int) -> None:
    mask = np.zeros((900, 900), np.uint8, order="F")
    mask[400 : 400 + side, 400 : 400 + side] = 1
    found = instances_from(1, (900, 900), [(3, 0.9, coco_mask.encode(mask)["counts"])])
    picture = np.array(found.overlay(Image.new("RGB", (900, 900)), {3: "cell"}))
    picture[400 : 400 + side, 400 : 400 + side] = 0
    assert least <= picture.any(-1).any(1).sum() <= most


def test_an_image_without_instances_stays_as_it_is() -> None:
    image = Image.new("L", (160, 120), 7)
    picture = two_squares().above(0.99).overlay(image)
    assert picture.mode == "RGB"
    assert (np.asarray(picture) == 7).all()


def test_tiny_images_and_empty_masks_can_be_drawn() -> None:
    empty = coco_mask.encode(np.zeros((1, 1), np.uint8, order="F"))["counts"]
    full = coco_mask.encode(np.ones((1, 1), np.uint8, order="F"))["counts"]
    found = instances_from(1, (1, 1), [(1, 0.5, full), (1, 0.0, empty)])
    assert found.overlay(Image.new("RGB", (1, 1))).size == (1, 1)


def test_an_image_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"120x160 \(height x width\), found 10x20\. Pass the original image"):
        draw_instances(Image.new("RGB", (20, 10)), two_squares(), {})


def test_neighbouring_colours_differ() -> None:
    colours = [np.array(colour(index)) for index in range(30)]
    assert all(np.abs(first - second).max() > 60 for first, second in pairwise(colours))
