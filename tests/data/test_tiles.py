"""Tiles of images: what an epoch shows of them, what a sample holds, and what each rank evaluates."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image

from m2f_trainer.data.collate import collate
from m2f_trainer.data.dataset import Category
from m2f_trainer.data.tiles import (
    EvalTiles,
    RecentImages,
    TileGrid,
    TileOrder,
    TileTransform,
    Tiling,
    TrainTiles,
    lay_tiles,
)
from m2f_trainer.data.transforms import TrainTransform, read_image, target_boxes
from m2f_trainer.errors import ImageError, RecipeError
from m2f_trainer.masks.segmentation import encode
from tests.data.test_transforms import whole

KINDS = [Category(1, "dot")]


def picture(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels that tell their place: red is the row, green the column."""
    rows, columns = np.indices(size)
    return np.stack([rows % 256, columns % 256, np.zeros(size)], -1).astype(np.uint8)


def write_rows(folder: Path, images: list[tuple[tuple[int, int], list[tuple[int, int, int, int]]]]) -> Dataset:
    """A split of images (height, width), with rectangles x0, y0, x1, y1 as objects."""
    rows = []
    for number, (size, boxes) in enumerate(images):
        path = folder / f"{number}.png"
        Image.fromarray(picture(size)).save(path)
        objects = []
        for k, (x0, y0, x1, y1) in enumerate(boxes):
            bitmap = np.zeros(size, np.uint8)
            bitmap[y0:y1, x0:x1] = 1
            objects.append({"id": k, "category_id": 1, "iscrowd": False, "counts": encode(bitmap)})
        image = {"path": str(path), "bytes": None}
        rows.append({"image": image, "image_id": 10 + number, "height": size[0], "width": size[1], "objects": objects})
    return Dataset.from_list(rows)


def window_of(sample: dict[str, Any]) -> tuple[int, int]:
    """Row and column of the original image that a sample of scale 1 begins at, unless it is mirrored."""
    corner = sample["pixel_values"][:, 0, 0].tolist()
    return corner[0], corner[1]


def plain(side: int, frame: int, **settings: Any) -> TileTransform:
    """Without jitter and mirroring."""
    return TileTransform(frame, frame, side, **{"lsj_min_scale": 1.0, "lsj_max_scale": 1.0, "flip": False, **settings})


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    """Two images of 2 x 3 tiles of 50 pixels: dots in two tiles of the first, in none of the second."""
    return write_rows(tmp_path, [((100, 150), [(10, 10, 20, 20), (110, 60, 118, 68)]), ((100, 150), [])])


def test_an_epoch_shows_each_tile_with_objects_once_and_a_share_of_the_others(rows: Dataset) -> None:
    grid = TileGrid(rows, 50, 0.5)
    assert len(grid) == 4
    assert grid.counts[grid.tiles(0)].tolist() == [1, 1, 0, 0]
    filled = {(cell.image, cell.row, cell.column) for cell in (grid.cell(index, 7) for index in range(2))}
    assert filled == {(0, 0, 0), (0, 1, 2)}
    assert len(TileGrid(rows, 50, 0.0)) == 2
    assert len(TileGrid(rows, 50, 0.9)) == 12, "there are no more"


def test_tiles_that_do_not_fit_into_an_epoch_take_turns(rows: Dataset) -> None:
    grid = TileGrid(rows, 50, 0.5)
    seen = [grid.cell(index, epoch) for epoch in range(5) for index in (2, 3)]
    assert len({(cell.image, cell.row, cell.column) for cell in seen}) == 10, "all that are empty"
    assert not any(cell.filled for cell in seen)
    limited = TileGrid(rows, 50, 0.0, limit=1)
    assert len(limited) == 1
    assert [limited.cell(0, epoch).filled for epoch in range(4)] == [True] * 4
    shown = [(limited.cell(0, epoch).row, limited.cell(0, epoch).column) for epoch in range(4)]
    assert Counter(shown) == {(0, 0): 2, (1, 2): 2}


def test_a_sample_is_a_window_at_the_images_own_scale(tmp_path: Path) -> None:
    split = write_rows(tmp_path, [((100, 150), [(0, 0, 150, 100)])])
    tiles = TrainTiles(split, plain(50, 50), KINDS)
    assert len(tiles) == 6
    for epoch in range(5):
        starts = set()
        for index in range(6):
            sample = tiles.sample(index, epoch)
            top, left = window_of(sample)
            expected = picture((100, 150))[top : top + 50, left : left + 50].transpose(2, 0, 1)
            assert np.array_equal(sample["pixel_values"].numpy(), expected)
            assert sample["pixel_mask"].all()
            starts.add((top, left))
        assert len(starts) > 2, "the grid is one, shifted as a whole"
        assert len({left % 50 for _, left in starts} - {0}) <= 2, "but where it would leave the image"


def test_a_tile_is_enlarged_to_the_frame_and_a_small_image_is_padded_not_enlarged(tmp_path: Path) -> None:
    split = write_rows(tmp_path, [((30, 60), [(5, 5, 15, 15)])])
    sample = TrainTiles(split, plain(40, 80), KINDS).sample(0, 0)
    assert sample["resized_size"] == (60, 120)
    assert sample["pixel_mask"][:60].all()
    assert not sample["pixel_mask"][60:].any()
    x0, y0, x1, y1 = sample["boxes"][0].tolist()
    assert (y0, y1, x1 - x0) == (10, 30, 20)


def test_the_jitter_is_about_the_images_own_scale(tmp_path: Path) -> None:
    split = write_rows(tmp_path, [((200, 200), [(0, 0, 200, 200)])])
    tiles = TrainTiles(split, plain(50, 100, lsj_min_scale=0.5, lsj_max_scale=2.0), KINDS)
    scales = [tiles.sample(index, 0)["resized_size"][0] / 200 / 2 for index in range(len(tiles))]
    assert 0.5 <= min(scales) < 0.8
    assert 1.4 < max(scales) <= 2.0


def test_the_shift_never_takes_a_tile_off_all_its_objects(tmp_path: Path) -> None:
    split = write_rows(tmp_path, [((120, 120), [(1, 1, 4, 4)]), ((120, 120), [(58, 2, 61, 5), (2, 60, 4, 62)])])
    tiles = TrainTiles(split, plain(40, 40), KINDS)
    counts = [len(tiles.sample(index, epoch)["masks"]) for epoch in range(20) for index in range(len(tiles))]
    assert min(counts) == 1


def test_objects_and_their_masks_stay_where_the_window_shows_them(tmp_path: Path) -> None:
    split = write_rows(tmp_path, [((100, 100), [(10, 10, 30, 30), (60, 20, 90, 80), (40, 85, 99, 99)])])
    truth = np.zeros((100, 100), np.uint8)
    for x0, y0, x1, y1 in target_boxes(split[0]).astype(int).tolist():
        truth[y0:y1, x0:x1] = 1
    tiles = TrainTiles(split, plain(50, 50), KINDS)
    for epoch, index in np.ndindex(6, len(tiles)):
        sample = tiles.sample(index, epoch)
        top, left = window_of(sample)
        seen = np.zeros((50, 50), np.uint8)
        for k in range(len(sample["masks"])):
            seen |= whole(sample, k)
        missing = truth[top : top + 50, left : left + 50].astype(int) - seen
        assert missing.min() == 0
        assert missing.sum() < 0.1 * 20 * 30 + 0.1 * 400, "nothing but slivers"


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((46, 10, 66, 30), True),  # a fifth of it is in the window 0:50
        ((49, 10, 69, 30), False),  # a twentieth: 20 pixels, of 2,500
        ((48, 0, 100, 50), True),  # a twenty-fifth, but 100 pixels are more than a hundredth of the window
        ((49, 10, 50, 11), True),  # all of it, however small
    ],
)
def test_a_cut_object_stays_unless_only_a_sliver_of_it_is_in_view(
    tmp_path: Path, box: tuple[int, int, int, int], kept: bool
) -> None:
    split = write_rows(tmp_path, [((50, 100), [box])])
    transform = plain(50, 50)
    transform_at_the_left = [
        transform({**split[0], "cell": TileGrid(split, 50, 0.9).cell(index, 0)}, epoch)
        for index in range(len(TileGrid(split, 50, 0.9)))
        for epoch in range(40)
    ]
    at_the_left = [sample for sample in transform_at_the_left if window_of(sample) == (0, 0)]
    assert at_the_left
    assert {len(sample["masks"]) for sample in at_the_left} == {int(kept)}


def test_a_sample_is_a_function_of_seed_epoch_and_index_alone(rows: Dataset) -> None:
    def drawn(seed: int, epoch: int, index: int) -> bytes:
        settings = {"lsj_min_scale": 0.8, "lsj_max_scale": 1.25, "flip": True, "color_jitter": 0.3, "copy_paste": 0.5}
        tiles = TrainTiles(rows, TileTransform(56, 56, 50, seed=seed, **settings), KINDS, 0.5)
        sample = tiles.sample(index, epoch)
        return bytes(sample["pixel_values"].numpy().tobytes())

    assert drawn(1, 4, 2) == drawn(1, 4, 2)
    assert len({drawn(1, 4, 2), drawn(2, 4, 2), drawn(1, 5, 2), drawn(1, 4, 3)}) == 4


def test_a_row_without_a_tile_as_for_copy_paste_is_shown_at_a_random_place(rows: Dataset) -> None:
    places = {window_of(plain(50, 50)(rows[0], 0, index)) for index in range(30)}
    assert len(places) > 20
    assert {top for top, _ in places} >= {0, 50}, "the edges are seen too"
    assert isinstance(plain(50, 50), TrainTransform)


def test_evaluation_shows_every_tile_at_one_scale_and_says_which_it_is(tmp_path: Path) -> None:
    split = write_rows(tmp_path, [((100, 70), [(1, 1, 5, 5)]), ((30, 30), [])])
    tiles = EvalTiles(split, Tiling(40, 0.25, (80, 80)), KINDS)
    laid = lay_tiles((100, 70), 40, 0.25)
    assert len(tiles) == len(laid) + 1
    batch = collate([tiles[index] for index in range(len(tiles))])
    assert batch["tile"].tolist() == [*([k, 100, 70] for k in range(len(laid))), [0, 30, 30]]
    assert batch["image_id"].tolist() == [10] * len(laid) + [11]
    assert batch["original_size"].tolist() == [[40, 40]] * len(laid) + [[30, 30]]
    assert batch["resized_size"].tolist() == [[80, 80]] * len(laid) + [[60, 60]]
    for index, tile in enumerate(laid):
        x0, y0, x1, y1 = tile.box
        expected = Image.fromarray(picture((100, 70))[y0:y1, x0:x1]).resize((80, 80), Image.Resampling.BILINEAR)
        assert np.array_equal(batch["pixel_values"][index].numpy(), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_get_images_whole_and_equally_many_batches(tmp_path: Path, world: int) -> None:
    sizes = [(40, 40), (100, 100), (40, 100), (40, 40)]
    split = write_rows(tmp_path, [(size, []) for size in sizes])
    tiles = EvalTiles(split, Tiling(40, 0.2, (40, 40)), KINDS)
    seen: Counter[tuple[int, int]] = Counter()
    owners: dict[int, set[int]] = {}
    batches = set()
    for rank in range(world):
        tiles.shard(rank, world, 2)
        batches.add(-(-len(tiles) // 2))
        for index in range(len(tiles)):
            sample = tiles[index]
            if sample["tile"][0] >= 0:
                seen[sample["image_id"], sample["tile"][0]] += 1
                owners.setdefault(sample["image_id"], set()).add(rank)
            else:
                assert not sample["pixel_values"].any()
    assert seen == {(10 + k, tile): 1 for k, size in enumerate(sizes) for tile in range(len(lay_tiles(size, 40, 0.2)))}
    assert all(len(ranks) == 1 for ranks in owners.values())
    assert len(batches) == 1


def test_an_image_of_another_size_than_its_row_is_named(rows: Dataset, tmp_path: Path) -> None:
    Image.fromarray(picture((99, 150))).save(tmp_path / "0.png")
    with pytest.raises(ImageError, match=r"image 10 .*expected 150x100 pixels"):
        EvalTiles(rows, Tiling(50, 0.2, (50, 50)), KINDS)[0]
    with pytest.raises(RecipeError, match=r"overlap from 0 to below 0\.5"):
        EvalTiles(rows, Tiling(50, 0.5, (50, 50)), KINDS)


def test_an_epoch_shows_every_tile_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    split = write_rows(tmp_path, [((100, 150), [(0, 0, 150, 100)]), ((50, 200), [(0, 0, 200, 50)])])
    tiles = TrainTiles(split, plain(50, 50), KINDS)
    order = TileOrder(tiles, seed=3)
    first = list(order)
    assert list(order) == first
    assert sorted(first) == list(range(10)) == list(range(len(order)))
    assert first != sorted(first)
    tiles.set_epoch(1)
    assert list(order) != first
    assert list(TileOrder(tiles, seed=4)) != list(order)


def test_images_that_do_not_fit_in_memory_together_are_read_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = write_rows(tmp_path, [((100, 150), [(0, 0, 150, 100)])] * 6)
    transform = plain(50, 50)
    transform.recent = RecentImages(limit=2 * 100 * 150)
    tiles, opened = TrainTiles(split, transform, KINDS), []
    monkeypatch.setattr(
        "m2f_trainer.data.tiles.read_image", lambda row: opened.append(row["image_id"]) or read_image(row)
    )
    order = list(TileOrder(tiles, seed=0, limit=2 * 100 * 150))
    shown = [tiles.sample(index, 0) for index in order]
    assert sorted(opened) == sorted(split["image_id"])
    of_images = [sample["image_id"] for sample in shown]
    assert len({tuple(sorted(set(of_images[k : k + 12]))) for k in range(0, 36, 12)}) == 3, "two images at a time"
    assert len(set(of_images[:6])) == 2, "mixed"
    fresh = TrainTiles(split, plain(50, 50), KINDS)
    for index, sample in zip(order, shown, strict=True):
        assert torch.equal(sample["pixel_values"], fresh.sample(index, 0)["pixel_values"])


def test_a_worker_starts_without_the_images_of_another_process(rows: Dataset) -> None:
    recent = RecentImages(limit=1)
    image = recent.read(rows[0])
    assert recent.read(rows[0]) is image
    copied = pickle.loads(pickle.dumps(recent))
    assert copied.limit == 1
    assert copied.read(rows[0]) is not image
    recent.read(rows[1])
    assert recent.read(rows[0]) is not image, "one image is kept even if it is larger than the limit, no other"


def test_images_of_copy_paste_are_kept_where_there_is_room_and_replace_none(tmp_path: Path) -> None:
    split = write_rows(tmp_path, [((100, 150), [(0, 0, 150, 100)])] * 3)
    recent = RecentImages(limit=2 * 100 * 150)
    of_tile, pasted = recent.read(split[0]), recent.read(split[1], replace=False)
    assert recent.read(split[1], replace=False) is pasted
    other = recent.read(split[2], replace=False)
    assert recent.read(split[2], replace=False) is not other
    assert recent.read(split[0]) is of_tile
    next_tile = recent.read(split[2])
    assert recent.read(split[2]) is next_tile
    assert recent.read(split[1], replace=False) is not pasted, "the image used least recently makes room"
