"""Images and masks move together for any crop, overlaps survive, randomness depends on (seed, epoch, index) only."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.geometry import Crop
from m2f_trainer.data.transforms import EvalTransform, TrainTransform, make_sample, random_colors
from m2f_trainer.errors import ImageError
from m2f_trainer.masks import segmentation as masks
from tests.data.folders import REAL, needs_real_data


def row_of(bitmaps: list[np.ndarray], image: np.ndarray | None = None, crowd: tuple[int, ...] = ()) -> dict[str, Any]:
    height, width = bitmaps[0].shape
    pixels = np.repeat(bitmaps[0][..., None] * 255, 3, axis=2).astype(np.uint8) if image is None else image
    objects = [
        {"id": i + 1, "category_id": 10 + i, "iscrowd": i in crowd, "counts": masks.encode(bitmap)}
        for i, bitmap in enumerate(bitmaps)
    ]
    return {"image": pixels, "image_id": 3, "height": height, "width": width, "objects": objects}


def rectangle(height: int, width: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    bitmap = np.zeros((height, width), dtype=np.uint8)
    bitmap[y0:y1, x0:x1] = 1
    return bitmap


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2).astype(np.uint8)


def whole(sample: dict[str, Any], i: int) -> np.ndarray:
    """Instance i in the padded frame."""
    full = np.zeros(sample["pixel_mask"].shape, dtype=np.uint8)
    x0, y0, x1, y1 = sample["boxes"][i].tolist()
    full[y0:y1, x0:x1] = sample["masks"][i]
    return full


def test_evaluation_resizes_pads_right_and_bottom_and_says_where_the_image_is():
    bitmap = disc(60, 100, 40, 30, 20)
    sample = EvalTransform(128, 128)(row_of([bitmap]))
    assert sample["pixel_values"].shape == (3, 128, 128)
    assert sample["pixel_values"].dtype == torch.uint8
    assert (sample["original_size"], sample["resized_size"]) == ((60, 100), (77, 128))
    assert sample["pixel_mask"][:77].all()
    assert not sample["pixel_mask"][77:].any()
    assert not sample["pixel_values"][:, 77:].any()
    expected = np.asarray(Image.fromarray(bitmap * 255).resize((128, 77), Image.Resampling.BILINEAR))
    assert np.array_equal(sample["pixel_values"][0, :77].numpy(), expected)
    assert np.array_equal(whole(sample, 0)[:77], expected > 127)
    assert sample["category_ids"].tolist() == [10]


def test_one_image_alone_is_prepared_as_a_row_is():
    row = row_of([disc(60, 100, 40, 30, 20)])
    values, valid, frames = EvalTransform(128, 96).prepare(row["image"])
    sample = EvalTransform(128, 96)(row)
    assert torch.equal(values, sample["pixel_values"])
    assert torch.equal(valid, sample["pixel_mask"])
    assert (frames.original, frames.resized, frames.padded) == ((60, 100), (58, 96), (128, 96))


@pytest.mark.parametrize("side", [40, 61, 150])
def test_images_are_resized_as_by_pillow_and_to_within_a_level_for_training(side):
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    values, _, _ = EvalTransform(side, side).prepare(image)
    assert np.array_equal(values.numpy(), expected)
    row = row_of([rectangle(100, 100, 0, 0, 9, 9)], image)
    seen = TrainTransform(side, side, lsj_min_scale=1, lsj_max_scale=1, flip=False)(row)["pixel_values"]
    assert np.abs(seen.numpy().astype(int) - expected).max() <= 1


def test_nothing_changes_at_the_original_size():
    bitmap = disc(64, 64, 20, 30, 12)
    sample = EvalTransform(64, 64)(row_of([bitmap]))
    assert np.array_equal(whole(sample, 0), bitmap)
    assert np.array_equal(sample["pixel_values"][0].numpy(), bitmap * 255)


def test_masks_follow_the_pixels_through_scale_crop_and_flip():
    bitmap = disc(120, 160, 70, 60, 33)
    transform = TrainTransform(96, 128, lsj_min_scale=0.3, lsj_max_scale=2.0, seed=1)
    shown = 0
    for index in range(60):
        sample = transform(row_of([bitmap]), 0, index)
        if not sample["masks"]:
            continue
        shown += 1
        pixels = sample["pixel_values"][0].numpy().astype(int)
        differs = (pixels > 127) != whole(sample, 0)
        assert (np.abs(pixels[differs] - 127) <= 2).all()  # rounding at the half level
        assert differs.sum() < 20
    assert shown > 40


def test_boxes_are_tight_and_bitmaps_cropped_to_them():
    transform = TrainTransform(64, 64, seed=2)
    for index in range(50):
        sample = transform(row_of([disc(80, 80, 30, 40, 9), disc(80, 80, 60, 60, 25)]), 0, index)
        for bitmap, (x0, y0, x1, y1) in zip(sample["masks"], sample["boxes"].tolist(), strict=True):
            assert bitmap.shape == (y1 - y0, x1 - x0)
            assert bitmap.flags.c_contiguous
            assert set(np.unique(bitmap)) <= {0, 1}
            assert bitmap[0].any() and bitmap[-1].any() and bitmap[:, 0].any() and bitmap[:, -1].any()  # noqa: PT018
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64


def test_overlapping_instances_keep_all_their_pixels_and_crowds_are_left_out():
    first, second = rectangle(50, 50, 5, 5, 30, 30), rectangle(50, 50, 20, 20, 45, 45)
    sample = EvalTransform(50, 50)(row_of([first, second, np.ones((50, 50), np.uint8)], crowd=(2,)))
    assert [int(bitmap.sum()) for bitmap in sample["masks"]] == [625, 625]
    assert sample["category_ids"].tolist() == [10, 11]


def test_what_leaves_the_crop_is_dropped_and_images_without_objects_stay():
    crop = Crop((50, 50), (50, 50), (0, 0, 16, 16))
    row = row_of([rectangle(50, 50, 30, 30, 40, 40), rectangle(50, 50, 10, 10, 20, 20)])
    sample = make_sample(Image.new("RGB", (50, 50)), row, crop, (16, 16))
    assert sample["category_ids"].tolist() == [11]
    assert sample["boxes"].tolist() == [[10, 10, 16, 16]]
    empty = EvalTransform(16, 16)({**row, "objects": []})
    assert empty["boxes"].shape == (0, 4)
    assert empty["boxes"].dtype == torch.int32
    assert empty["category_ids"].dtype == torch.int64


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    same = torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["boxes"], b["boxes"])
    return same and all(np.array_equal(x, y) for x, y in zip(a["masks"], b["masks"], strict=True))


def test_augmentation_is_a_function_of_seed_epoch_and_index_alone():
    noise = np.random.default_rng(0).integers(0, 256, size=(80, 90, 3), dtype=np.uint8)
    row = row_of([disc(80, 90, 40, 40, 30)], noise)
    first = TrainTransform(64, 64, color_jitter=0.3, seed=5)
    expected = first(row, 2, 7)
    first(row, 0, 0)
    assert equal(expected, first(row, 2, 7))
    assert equal(expected, TrainTransform(64, 64, color_jitter=0.3, seed=5)(row, 2, 7))
    for other in (first(row, 3, 7), first(row, 2, 8), TrainTransform(64, 64, color_jitter=0.3, seed=6)(row, 2, 7)):
        assert not torch.equal(expected["pixel_values"], other["pixel_values"])


def test_without_flip_nothing_is_mirrored_and_with_it_half_is():
    bitmap = rectangle(64, 64, 0, 0, 20, 64)
    for flip, expected in ((False, {0}), (True, {0, 44})):
        transform = TrainTransform(64, 64, lsj_min_scale=1, lsj_max_scale=1, flip=flip)
        lefts = [transform(row_of([bitmap]), 0, index)["boxes"][0, 0].item() for index in range(40)]
        assert set(lefts) == expected
        assert lefts.count(0) > 10


def test_colour_jitter_moves_colours_but_not_masks():
    bitmap = disc(64, 64, 30, 30, 20)
    row = row_of([bitmap], np.full((64, 64, 3), (200, 90, 40), dtype=np.uint8))
    colors = set()
    for index in range(10):
        sample = TrainTransform(64, 64, lsj_min_scale=1, lsj_max_scale=1, flip=False, color_jitter=0.4)(row, 0, index)
        assert np.array_equal(whole(sample, 0), bitmap)
        colors.add(tuple(sample["pixel_values"][:, 0, 0].tolist()))
    assert len(colors) == 10
    assert random_colors(0.0, np.random.default_rng(0)) is None


def test_the_colour_map_keeps_greys_grey():
    matrix = np.array(random_colors(0.5, np.random.default_rng(0))).reshape(3, 4)
    assert np.ptp(matrix @ [100, 100, 100, 1]) == pytest.approx(0)


def test_an_image_of_another_size_is_refused_with_its_name():
    row = {**row_of([disc(40, 40, 20, 20, 5)]), "height": 80}
    for transform in (EvalTransform(32, 32), TrainTransform(32, 32)):
        with pytest.raises(ImageError, match="image 3: expected 40x80 pixels"):
            transform(row)


@needs_real_data
def test_jpegs_decoded_small_look_like_those_decoded_whole(tmp_path):
    row = load_coco(REAL / "coco_tiny", cache_dir=tmp_path)["train"][0]
    transform = TrainTransform(320, 320, lsj_min_scale=0.2, lsj_max_scale=0.3)
    path = row["image"]["path"]
    with Image.open(path) as image:
        decoded = {**row, "image": image.convert("RGB")}
    for index in range(5):
        small, large = transform(row, 0, index), transform(decoded, 0, index)
        assert torch.equal(small["boxes"], large["boxes"])
        assert (small["pixel_values"].float() - large["pixel_values"].float()).abs().mean() < 3
