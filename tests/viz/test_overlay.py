"""Pictures show every object and don't change the image; labels hide nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from m2f_trainer.inference.instances import Instances
from m2f_trainer.viz.overlay import TINT, Shape, add_legend, choose_style, color, draw_shapes
from tests.evaluation.truth import instances_from

CAT_AND_DOG = {3: "cat", 4: "dog"}


def two_squares() -> Instances:
    masks = np.zeros((2, 240, 320), np.uint8)
    masks[0, 60:160, 40:120] = 1
    masks[1, 100:200, 80:240] = 1
    found = [(3 + k, 0.9 - k / 10, coco_mask.encode(np.asfortranarray(mask))["counts"]) for k, mask in enumerate(masks)]
    return instances_from(1, (240, 320), found)


def grid_of_squares(classes: int) -> Instances:
    """25 squares of 12 pixels on an image of 100 x 100."""
    masks = np.zeros((25, 100, 100), np.uint8)
    for k in range(25):
        y, x = 4 + 19 * (k // 5), 4 + 19 * (k % 5)
        masks[k, y : y + 12, x : x + 12] = 1
    return instances_from(
        1,
        (100, 100),
        [(1 + k % classes, 0.9, coco_mask.encode(np.asfortranarray(m))["counts"]) for k, m in enumerate(masks)],
    )


def test_masks_are_tinted_outlined_and_labelled_on_a_copy() -> None:
    image = Image.new("RGB", (320, 240), (100, 100, 100))
    picture = np.asarray(two_squares().overlay(image, CAT_AND_DOG)).astype(int)
    assert (np.asarray(image) == 100).all()
    first, second = np.array(color(0)), np.array(color(1))
    assert abs(picture[130, 60] - ((1 - TINT) * 100 + TINT * first)).max() <= 1
    assert abs(picture[180, 200] - ((1 - TINT) * 100 + TINT * second)).max() <= 1
    assert (picture[159, 60] == first).all()
    assert (picture[220, 20] == 100).all()
    assert (picture[44:58, 41:100] == first).all(-1).any(), "a label above the first"


def test_objects_of_one_class_have_colours_of_their_own_and_no_name() -> None:
    style = choose_style((240, 320), two_squares().boxes, [3, 3], [0.9, 0.8], {3: "cat"})
    assert style.labels == ["90%", "80%"]
    assert style.colors[0] != style.colors[1]
    assert not style.legend
    assert choose_style((240, 320), two_squares().boxes, [3, 3], [np.nan] * 2, {3: "cat"}).labels == ["", ""]


def test_labels_that_would_cover_much_of_a_small_image_give_way_to_a_legend() -> None:
    boxes = np.array([[5.0, 5, 40, 40], [55, 5, 40, 40], [30, 55, 40, 40]])
    names = {1: "circle", 2: "square", 3: "triangle"}
    small = choose_style((100, 100), boxes, [1, 2, 3], [0.9] * 3, names)
    assert list(small.legend) == ["circle", "square", "triangle"]
    assert not any(small.labels)
    assert choose_style((480, 640), 4.8 * boxes, [1, 2, 3], [0.9] * 3, names).labels[0] == "circle 90%"


def test_many_small_objects_of_one_class_have_neither_labels_nor_legend() -> None:
    picture = np.asarray(grid_of_squares(1).overlay(Image.new("RGB", (100, 100)), {1: "nucleus"})).astype(float)
    assert picture.shape == (100, 100, 3)
    assert (picture.any(-1)).sum() == 25 * 144, "nothing outside the objects"
    for k in range(25):
        assert np.abs(picture[10 + 19 * (k // 5), 10 + 19 * (k % 5)] - TINT * np.array(color(k))).max() <= 1


def test_many_objects_of_several_classes_are_coloured_by_class_with_a_legend_below() -> None:
    image, found = Image.new("RGB", (100, 100)), grid_of_squares(2)
    picture = np.asarray(found.overlay(image, {1: "window", 2: "door", 9: "absent"}))
    assert picture.shape[0] > 100
    assert picture.shape[1] == 100
    assert (picture[:100].any(-1)).sum() == 25 * 144
    for index in range(2):
        assert (picture[4, 4 + 19 * index] == color(index)).all()
        assert (picture[100:] == color(index)).all(-1).any(), "the legend has the colour of the class"
    assert not (picture[100:] == color(2)).all(-1).any(), "only classes that are in the image"
    assert found.overlay(image, {1: "window", 2: "door"}, legend=False).size == image.size


def test_a_class_has_one_colour_whatever_else_is_in_the_image() -> None:
    boxes, names = np.full((25, 4), 2.0), {1: "window", 2: "door", 3: "car"}
    for ids in ([3] * 25, [1, 3] * 12 + [2]):
        assert choose_style((100, 100), boxes, ids, [1.0] * 25, names).legend["car"] == color(2)


@pytest.mark.parametrize(("side", "labelled"), [(6, False), (60, True)])
def test_labels_are_left_out_where_they_are_larger_than_the_objects(side: int, labelled: bool) -> None:
    style = choose_style((640, 640), np.array([[5.0, 5, 3 * side, side]]), [1], [0.5], {1: "cat", 2: "dog"})
    assert style.labels == (["cat 50%"] if labelled else [""])
    assert list(style.legend) == ([] if labelled else ["cat"])


def test_a_label_never_lies_on_the_middle_of_another_object() -> None:
    bitmap, shapes = np.ones((12, 12), np.uint8), []
    for k in range(25):
        y, x = 4 + 19 * (k // 5), 4 + 19 * (k % 5)
        shapes.append(Shape((x, y, x + 12, y + 12), bitmap, color(k), "nucleus 90%"))
    picture = np.asarray(draw_shapes(Image.new("RGB", (100, 100)), shapes)).astype(float)
    for k in range(25):
        assert np.abs(picture[10 + 19 * (k // 5), 10 + 19 * (k % 5)] - TINT * np.array(color(k))).max() <= 1


def test_a_long_legend_takes_several_rows() -> None:
    image = Image.new("RGB", (300, 50))
    short = add_legend(image, {"cat": color(0)})
    long = add_legend(image, {f"a long name {k}": color(k) for k in range(9)})
    assert short.width == long.width == 300
    assert 50 < short.height < long.height
    assert add_legend(image, {}) is image


def test_a_legend_is_written_in_the_letters_of_other_alphabets() -> None:
    image = Image.new("RGB", (300, 50))
    for first, second in (("кот", "бык"), ("γάτα", "άλογ"), ("ñandú", "ćandó")):
        drawn = [np.asarray(add_legend(image, {name: color(0)})) for name in (first, second)]
        assert drawn[0].shape == drawn[1].shape
        assert (drawn[0] != drawn[1]).any(), "boxes of missing letters are all alike"


def test_a_name_in_a_legend_is_one_line_and_not_wider_than_the_image() -> None:
    for width in (60, 300):
        image = Image.new("RGB", (width, 50))
        plain, long, broken = (np.asarray(add_legend(image, {name: color(0)})) for name in ("a", "a" * 500, "a\nb"))
        assert plain.shape == long.shape == broken.shape
        assert (long[50:, -2:] == 255).all(), "the last letter is complete"
        assert (long[50:, width // 2 : -8] < 100).any(), "the name fills the row"


def test_labels_that_are_wider_than_the_image_give_way_to_a_legend() -> None:
    boxes, names = np.array([[5.0, 5, 50, 900], [5.0, 1000, 50, 900]]), {1: "a name of thirty characters...", 2: "dog"}
    assert list(choose_style((2000, 60), boxes, [1, 2], [0.9] * 2, names).legend) == list(names.values())
    assert choose_style((2000, 360), boxes, [1, 2], [0.9] * 2, names).labels[0] == f"{names[1]} 90%"


def test_labels_are_one_line() -> None:
    style = choose_style((240, 320), two_squares().boxes, [3, 4], [0.9] * 2, {3: "black\ncat", 4: "dog"})
    assert style.labels == ["black?cat 90%", "dog 90%"]


def test_an_image_without_instances_stays_as_it_is() -> None:
    image = Image.new("L", (320, 240), 7)
    picture = two_squares().above(0.99).overlay(image)
    assert picture.mode == "RGB"
    assert (np.asarray(picture) == 7).all()


def test_tiny_images_and_empty_masks_can_be_drawn() -> None:
    empty = coco_mask.encode(np.zeros((1, 1), np.uint8, order="F"))["counts"]
    full = coco_mask.encode(np.ones((1, 1), np.uint8, order="F"))["counts"]
    found = instances_from(1, (1, 1), [(1, 0.5, full), (1, 0.0, empty)])
    assert found.overlay(Image.new("RGB", (1, 1)), boxes=True).size == (1, 1)


def test_boxes_are_drawn_where_they_were_asked_for() -> None:
    mask = np.zeros((50, 50), np.uint8, order="F")
    mask[10:40, 25] = mask[25, 10:40] = 1
    found = instances_from(1, (50, 50), [(1, 0.5, coco_mask.encode(mask)["counts"])])
    image = Image.new("RGB", (50, 50))
    assert not np.asarray(found.overlay(image))[39, 39].any()
    assert (np.asarray(found.overlay(image, boxes=True))[[39, 39], [10, 39]] == color(0)).all()


def test_an_image_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"240x320 \(height x width\), found 10x20\. Pass the original image"):
        two_squares().overlay(Image.new("RGB", (20, 10)))


def test_neighbouring_colours_differ() -> None:
    colours = [np.array(color(index)) for index in range(30)]
    assert all(np.abs(first - second).max() > 60 for first, second in pairwise(colours))
