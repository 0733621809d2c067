"""Crop and resize: each mask stays on its pixels for any window, flip and rotation."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.geometry import Crop, crop_image, crop_mask, in_crop, resize_to_fit, trim
from m2f_trainer.masks.segmentation import encode
from tests.data.test_transforms import disc, rectangle


@pytest.mark.parametrize(
    ("original", "padded", "resized"),
    [
        ((480, 640), (1024, 1024), (768, 1024)),
        ((640, 480), (1024, 1024), (1024, 768)),
        ((480, 640), (480, 640), (480, 640)),
        ((1, 5000), (64, 64), (1, 64)),
        ((7, 3), (64, 32), (64, 27)),
        ((1, 1), (16, 48), (16, 16)),
    ],
)
def test_an_image_is_fitted_with_its_aspect_and_at_least_a_pixel(original, padded, resized):
    assert resize_to_fit(original, padded).resized == resized


def in_frame(found: tuple[tuple[int, int, int, int], np.ndarray] | None, height: int, width: int) -> np.ndarray:
    """A cropped object in the whole frame of its crop."""
    frame = np.zeros((height, width), np.uint8)
    if found is not None:
        (x0, y0, x1, y1), bitmap = found
        frame[y0:y1, x0:x1] = bitmap
    return frame


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_a_cropped_mask_equals_the_crop_of_the_whole_resized_mask(flip, quarter_turns):
    rng = np.random.default_rng(0)
    for _ in range(20):
        bitmap = disc(90, 70, *rng.uniform(0, 70, size=2), rng.uniform(2, 30))
        height, width = (int(side) for side in rng.integers(20, 200, size=2))
        x0, y0 = int(rng.integers(0, width - 10)), int(rng.integers(0, height - 10))
        window = (x0, y0, min(width, x0 + 64), min(height, y0 + 48))
        full = np.asarray(Image.fromarray(bitmap * 255).resize((width, height), Image.Resampling.BILINEAR)) > 127
        expected = full[y0 : window[3], x0 : window[2]]
        expected = np.rot90(expected[:, ::-1] if flip else expected, quarter_turns)
        crop = Crop((90, 70), (height, width), window, flip, quarter_turns)
        assert (in_frame(crop_mask(encode(bitmap), crop), *expected.shape) != expected).sum() <= 1


def test_a_cropped_image_equals_the_crop_of_the_whole_resized_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))
    for width, height in ((140, 180), (35, 45), (70, 90)):
        whole = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        window = (width // 5, height // 6, width - 3, height - 1)
        found = crop_image(image, Crop((90, 70), (height, width), window))
        assert np.abs(found - whole[window[1] : window[3], window[0] : window[2]]).max() <= 1


@pytest.mark.parametrize(
    ("visible", "kept"),
    [
        (4, True),  # a tenth of it, as asked for
        (3, False),  # less, and 30 pixels of a window of 6,400
    ],
)
def test_a_sliver_of_an_object_is_left_out(visible, kept):
    bitmap = rectangle(100, 200, 80 - visible, 20, 120 - visible, 30)
    crop = Crop((100, 200), (100, 200), (0, 0, 80, 80), least_visible=0.1)
    assert (crop_mask(encode(bitmap), crop) is not None) is kept
    assert crop_mask(encode(rectangle(100, 200, 80, 0, 90, 9)), crop) is None, "outside the window"


def test_boxes_that_meet_the_window_are_found_in_the_original_frame():
    crop = Crop((100, 200), (50, 100), (10, 0, 60, 50))  # x from 20 to 120 of the original, all of y
    boxes = np.array([[0, 0, 20, 100], [0, 0, 20.5, 100], [119, 5, 130, 6], [120, 5, 130, 6]])
    assert in_crop(boxes, crop).tolist() == [False, True, True, False]


def test_a_bitmap_is_trimmed_to_its_set_pixels():
    box, bitmap = trim(rectangle(9, 9, 2, 3, 5, 4).astype(bool), (10, 20, 19, 29)) or ((), np.zeros(0))
    assert box == (12, 23, 15, 24)
    assert bitmap.tolist() == [[1, 1, 1]]
    assert trim(np.zeros((3, 3), bool), (0, 0, 3, 3)) is None
