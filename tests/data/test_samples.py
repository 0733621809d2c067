"""Copy-paste and turns keep masks on their pixels; small instances are dropped; randomness is (seed, epoch, index)."""

import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from m2f_trainer.config.arguments import AUGMENTATIONS, DataArguments
from m2f_trainer.data.collate import InstanceDataset, collate
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.transforms import EvalTransform, TrainTransform, drop_small, paste_instances
from m2f_trainer.errors import RecipeError
from tests.data.test_transforms import disc, rectangle, row_of, whole

STRONG = {"color_jitter": 0.4, "rotate90": True, "copy_paste": 0.9, "min_area": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return load_coco(write_sample(folder / "set", images=(12, 1, 0)), cache_dir=folder / "cache")["train"]


def digests(rows, workers: int = 0, prefetch: int | None = None, first: int = 0) -> list[str]:
    """A hash of every batch of epoch 3, from batch `first` on, as a run resumed there would ask for them."""
    data = InstanceDataset(rows, TrainTransform(48, 64, seed=5, **STRONG), categories_of(rows))
    data.set_epoch(3)
    order = np.random.default_rng(0).permutation(len(data)).tolist()[2 * first :]
    more = {"multiprocessing_context": "fork", "prefetch_factor": prefetch} if workers else {}
    loader = DataLoader(data, batch_size=2, sampler=order, collate_fn=collate, num_workers=workers, **more)
    return [digest(batch) for batch in loader]


def digest(batch) -> str:
    state = hashlib.sha256()
    parts = [batch["pixel_values"], batch["pixel_mask"], *batch["mask_labels"].values(), *batch["class_labels"]]
    for part in parts:
        state.update(part.numpy().tobytes())
    return state.hexdigest()


def test_workers_prefetching_and_resuming_change_no_byte_of_a_batch(rows):
    alone = digests(rows)
    assert len(set(alone)) == 6
    assert digests(rows, workers=1, prefetch=1) == alone
    assert digests(rows, workers=2, prefetch=4) == alone
    assert digests(rows, first=4) == alone[4:]
    assert digests(rows, workers=1, prefetch=2, first=3) == alone[3:]


def test_quarter_turns_keep_masks_on_their_pixels_in_frames_of_any_shape():
    bitmap = disc(120, 160, 50, 40, 22)
    transform = TrainTransform(96, 128, lsj_min_scale=0.3, lsj_max_scale=1.6, rotate90=True, seed=2)
    corners = set()
    for index in range(60):
        sample = transform(row_of([bitmap]), 0, index)
        assert sample["pixel_values"].shape == (3, 96, 128)
        if not sample["masks"]:
            continue
        mask = whole(sample, 0)
        bright = sample["pixel_values"][0].numpy() > 127
        assert (bright != mask.astype(bool)).mean() < 0.01
        height, width = np.argwhere(sample["pixel_mask"].numpy()).max(axis=0) + 1
        y, x = np.argwhere(mask).mean(axis=0)
        corners.add((y > height / 2, x > width / 2))
    assert len(corners) == 4


def test_four_quarter_turns_are_drawn_about_as_often():
    row = row_of([rectangle(64, 64, 0, 0, 64, 20)])
    transform = TrainTransform(64, 64, lsj_min_scale=1, lsj_max_scale=1, flip=False, rotate90=True)
    places = [tuple(transform(row, 0, index)["boxes"][0].tolist()) for index in range(200)]
    assert set(places) == {(0, 0, 64, 20), (0, 44, 64, 64), (0, 0, 20, 64), (44, 0, 64, 64)}
    assert min(places.count(place) for place in set(places)) > 30


def test_pasted_instances_lie_on_top_and_take_pixels_from_those_below():
    below = EvalTransform(64, 64)(row_of([disc(64, 64, 20, 20, 10), disc(64, 64, 50, 50, 4)]))
    above = EvalTransform(64, 64)(row_of([rectangle(64, 64, 20, 0, 64, 40), disc(64, 64, 60, 60, 2)]))
    pasted = paste_instances(below, above, np.array([True, False]))
    assert pasted["category_ids"].tolist() == [10, 11, 10]
    masks = [whole(pasted, k) for k in range(3)]
    assert np.array_equal(masks[2], rectangle(64, 64, 20, 0, 64, 40))
    assert np.array_equal(masks[0], disc(64, 64, 20, 20, 10) & ~masks[2].astype(bool))
    assert np.array_equal(masks[1], disc(64, 64, 50, 50, 4))
    top = torch.from_numpy(masks[2].astype(bool))
    assert torch.equal(pasted["pixel_values"][:, top], above["pixel_values"][:, top])
    assert torch.equal(pasted["pixel_values"][:, ~top], below["pixel_values"][:, ~top])
    hidden = paste_instances(EvalTransform(64, 64)(row_of([disc(64, 64, 40, 20, 5)])), above, np.array([True, False]))
    assert hidden["category_ids"].tolist() == [10]


def test_nothing_is_pasted_into_the_padding():
    narrow = EvalTransform(64, 64)(row_of([disc(64, 32, 10, 10, 5)]))
    above = EvalTransform(64, 64)(row_of([rectangle(64, 64, 20, 0, 64, 64), rectangle(64, 64, 40, 0, 64, 64)]))
    pasted = paste_instances(narrow, above, np.array([True, True]))
    assert not pasted["pixel_values"][:, ~narrow["pixel_mask"]].any()
    assert pasted["boxes"].tolist()[1:] == [[20, 0, 32, 64]]
    assert paste_instances(narrow, above, np.array([False, True])) is narrow


def test_copy_paste_brings_instances_of_the_other_images(rows):
    plain = TrainTransform(64, 64, lsj_min_scale=1, lsj_max_scale=1, flip=False, seed=1)
    mixing = TrainTransform(64, 64, lsj_min_scale=1, lsj_max_scale=1, flip=False, copy_paste=1.0, seed=1)
    more = sum(len(mixing(rows[i], 0, i, rows)["masks"]) for i in range(len(rows)))
    assert more > sum(len(plain(rows[i], 0, i, rows)["masks"]) for i in range(len(rows)))
    assert len(mixing(rows[0], 0, 0)["masks"]) == len(plain(rows[0], 0, 0)["masks"])


def test_instances_under_the_least_area_go_and_images_without_objects_stay():
    sample = EvalTransform(64, 64)(row_of([disc(64, 64, 20, 20, 10), disc(64, 64, 50, 50, 2)]))
    assert drop_small(1, sample) is sample
    assert drop_small(50, sample)["category_ids"].tolist() == [10]
    empty = drop_small(5000, sample)
    assert (empty["masks"], empty["boxes"].shape) == ([], (0, 4))
    assert collate([{**empty, "class_labels": empty["category_ids"]}])["mask_labels"]["values"].shape == (0,)


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_every_preset_makes_samples_and_a_field_of_its_own_wins(preset, rows):
    augment = DataArguments(dataset_name="a", augmentation=preset).augment()
    transform = TrainTransform(64, 64, flip=augment.pop("horizontal_flip"), **augment)
    assert transform(rows[0], 0, 0, rows)["pixel_values"].shape == (3, 64, 64)
    assert DataArguments(dataset_name="a", augmentation=preset, color_jitter=0.7).augment()["color_jitter"] == 0.7
    assert not DataArguments(dataset_name="a", augmentation=preset, horizontal_flip=False).augment()["horizontal_flip"]


def test_the_preset_none_shows_each_image_as_evaluation_does(rows):
    augment = DataArguments(dataset_name="a", augmentation="none").augment()
    transform = TrainTransform(64, 64, flip=augment.pop("horizontal_flip"), **augment)
    for index in range(4):
        drawn, plain = transform(rows[index], 1, index, rows), EvalTransform(64, 64)(rows[index])
        assert torch.equal(drawn["boxes"], plain["boxes"])
        assert (drawn["pixel_values"].float() - plain["pixel_values"].float()).abs().mean() < 6


def test_contradictory_scales_are_refused():
    with pytest.raises(RecipeError, match="lsj_min_scale: expected at most lsj_max_scale"):
        DataArguments(dataset_name="a", augmentation="light", lsj_min_scale=1.5)
