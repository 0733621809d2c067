"""Objects of an image that is read in tiles are found once and whole."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from m2f_trainer.data.tiles import Tiling, lay_tiles
from m2f_trainer.errors import RecipeError
from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.inference.results import record_of, write_dataset
from m2f_trainer.inference.tiles import Merger
from m2f_trainer.inference.windows import ArrayWindows, Windows

Labels = NDArray[np.int64]


class Seer:
    """Sees each tile perfectly, but for `blind`: an object is a colour, red is its class, the rest its number."""

    def __init__(self, blind: int | None = None) -> None:
        self.blind = blind

    def stream(self, images: Iterator[NDArray[np.uint8]], **_: object) -> Iterator[Instances]:
        for number, pixels in enumerate(images):
            codes = pixels.astype(np.int64) @ np.array([65536, 256, 1])
            found = [code for code in np.unique(codes) if code and number != self.blind]
            rles = [coco_mask.encode(np.asfortranarray(codes == code, np.uint8)) for code in found]
            categories = np.array([code // 65536 for code in found], np.int64)
            scores = np.linspace(0.9, 0.6, len(found))
            yield Instances(number, categories, scores, rles, tight_boxes(rles), pixels.shape[:2])


def scene(height: int = 150, width: int = 210) -> NDArray[np.uint8]:
    """Discs, a bar as long as the image, a ring, an object in the last row and column, and one single pixel."""
    y, x = np.mgrid[:height, :width]
    codes = np.zeros((height, width), np.int64)
    rng = np.random.default_rng(0)
    distance = np.hypot(y - 75, x - 105)
    codes[(distance > 55) & (distance < 60)] = 65536 + 101
    codes[70:76] = 65536 + 100
    for number in range(1, 100):
        cy, cx, radius = rng.integers(height), rng.integers(width), rng.integers(2, 14)
        disc = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
        if not codes[disc].any():
            codes[disc] = 65536 * (1 + number % 2) + number
    codes[-9:, -9:] = 65536 + 102
    codes[3, 3] = 65536 + 103
    return np.stack([codes // 65536, codes // 256 % 256, codes % 256], -1).astype(np.uint8)


def merged(seer: Any, image: Windows, tile: int, overlap: float) -> Instances:
    """What a seer finds in an image's tiles."""
    tiling = Tiling(tile, overlap, (tile, tile))
    merger, places = Merger(tiling), tiling.lay(image.size)
    seen = seer.stream(image.read(place.box) for place in places)
    *before, last = (merger.add(replace(one, image_id=0), k, image.size) for k, one in enumerate(seen))
    assert before == [None] * (len(places) - 1)
    assert last is not None
    return last


def found_in(pixels: NDArray[np.uint8], tile: int, overlap: float, seer: Seer | None = None) -> Instances:
    return merged(seer or Seer(), ArrayWindows(pixels), tile, overlap)


@pytest.mark.parametrize(("tile", "overlap"), [(64, 0.2), (50, 0.45), (40, 0.1), (1000, 0.2)])
def test_objects_cut_by_any_seam_come_back_whole_and_once(tile: int, overlap: float) -> None:
    pixels = scene()
    (whole,) = Seer().stream(iter([pixels]))
    found = found_in(pixels, tile, overlap)
    assert sorted(rle["counts"] for rle in found.rles) == sorted(rle["counts"] for rle in whole.rles)
    assert sorted(found.category_ids) == sorted(whole.category_ids)
    assert found.size == pixels.shape[:2]
    assert (np.diff(found.scores) <= 0).all()


def test_two_touching_objects_of_one_class_stay_two() -> None:
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[20:40, 10:90] = (1, 0, 1)
    pixels[40:55, 10:90] = (1, 0, 2)
    found = found_in(pixels, 60, 0.3)
    assert sorted(coco_mask.area(found.rles).tolist()) == [15 * 80, 20 * 80]


class Doubter(Seer):
    """Is surest in one tile, and takes every object for two pixels wider to the right there."""

    def __init__(self, sure: int) -> None:
        super().__init__()
        self.sure = sure

    def stream(self, images: Iterator[NDArray[np.uint8]], **_: object) -> Iterator[Instances]:
        for number, (found,) in enumerate([*Seer().stream(iter([pixels]))] for pixels in images):
            if number != self.sure:
                yield replace(found, scores=found.scores / 2)
                continue
            masks = [found.mask(index) for index in range(len(found))]
            wider = [mask | np.roll(mask, 1, 1) | np.roll(mask, 2, 1) for mask in masks]
            rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in wider]
            yield replace(found, rles=rles, boxes=tight_boxes(rles))


@pytest.mark.parametrize("sure", [0, 1])
def test_of_tiles_that_see_an_object_whole_the_surest_outlines_it(sure: int) -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[10:20, 44:54] = (1, 0, 1)  # tiles 0:60 and 40:100
    found = found_in(pixels, 60, 0.3, Doubter(sure))
    assert coco_mask.area(found.rles).tolist() == [120]
    assert found.scores.tolist() == [0.9]


def test_a_tile_that_cuts_an_object_is_not_asked_however_sure_it_is() -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[10:20, 54:68] = (1, 0, 1)  # tiles 0:60, which cuts it, and 40:100, which sees it whole
    found = found_in(pixels, 60, 0.3, Doubter(0))
    assert coco_mask.area(found.rles).tolist() == [140]
    assert found.scores.tolist() == [0.45]


def test_a_cut_piece_that_no_other_tile_knows_of_counts_for_less() -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[10:20, 30:62] = (1, 0, 1)  # tiles 0:60 and 40:100 both cut it; the second is blind
    found = found_in(pixels, 60, 0.3, Seer(blind=1))
    assert coco_mask.area(found.rles).tolist() == [300]
    assert found.scores == pytest.approx([0.27])


def test_duplicates_of_one_class_become_one_and_the_better_one_stays() -> None:
    tiling = Tiling(60, 0.3, (60, 60))
    whole, shifted = np.zeros((2, 60, 60), np.uint8, order="F")
    whole[10:20, 10:20], shifted[10:20, 11:21] = 1, 1
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in (whole, shifted)]
    size = (60, 60)
    found = Instances(5, np.array([1, 1]), np.array([0.4, 0.8]), rles, tight_boxes(rles), size)
    one = Merger(tiling).add(found, 0, size)
    assert one is not None
    assert (one.image_id, one.scores.tolist(), one.boxes.tolist()) == (5, [0.8], [[11, 10, 10, 10]])
    two = Merger(tiling).add(replace(found, category_ids=np.array([1, 2])), 0, size)
    assert two is not None
    assert two.category_ids.tolist() == [2, 1], "objects of two classes may be in one place"
    best = Merger(tiling, limit=1).add(replace(found, category_ids=np.array([1, 2])), 0, size)
    assert best is not None
    assert best.scores.tolist() == [0.8]


def test_tiles_of_several_images_may_come_in_any_order() -> None:
    """Batches hold tiles of several images, and blank ones at the end of a rank's share."""
    tiling, pixels = Tiling(64, 0.2, (64, 64)), {1: scene(), 2: scene(100, 90)}
    tiles = [(k, number) for k, image in pixels.items() for number in range(len(tiling.lay(image.shape[:2])))]
    order = np.random.default_rng(0).permutation(len(tiles)).tolist()
    merger, found = Merger(tiling), []
    for place in order:
        k, number = tiles[place]
        (seen,) = Seer().stream(iter([ArrayWindows(pixels[k]).read(tiling.lay(pixels[k].shape[:2])[number].box)]))
        found += merger.add_batch([replace(seen, image_id=k), seen], [(number, *pixels[k].shape[:2]), (-1, 9, 9)])
    assert {one.image_id: len(one) for one in found} == {
        k: len(found_in(image, 64, 0.2)) for k, image in pixels.items()
    }


def test_a_fragment_is_believed_only_in_its_tiles_own_part() -> None:
    pixels = np.zeros((40, 70, 3), np.uint8)
    pixels[10:20, 34:60] = (1, 0, 1)  # tiles 0:40 and 30:70, whose own parts meet at 35
    first, second = lay_tiles((40, 70), 40, 0.25)
    assert (first.box, second.box, first.core) == ((0, 0, 40, 40), (30, 0, 70, 40), (0, 0, 35, 40))
    assert len(found_in(pixels, 40, 0.25, Seer(blind=1))) == 0
    pixels = np.roll(pixels, -6, 1)
    assert len(found_in(pixels, 40, 0.25, Seer(blind=1))) == 1


def test_cores_partition_an_image_and_tiles_share_the_overlap_asked_for() -> None:
    for size, tile, overlap in (((97, 203), 50, 0.2), ((1, 1), 8, 0.0), ((64, 65), 64, 0.4), ((30, 300), 64, 0.49)):
        tiles = lay_tiles(size, tile, overlap)
        covered = np.zeros(size, int)
        for one in tiles:
            covered[one.core[1] : one.core[3], one.core[0] : one.core[2]] += 1
            assert one.box[0] <= one.core[0] <= one.core[2] <= one.box[2]
            assert max(one.box[2] - one.box[0], one.box[3] - one.box[1]) <= tile
        assert (covered == 1).all()
    with pytest.raises(RecipeError, match=r"overlap from 0 to below 0\.5"):
        lay_tiles((10, 10), 5, 0.5)


class Stars:
    """A dark sky of any size with a star every 250 pixels, which is never in memory as a whole."""

    def __init__(self, side: int) -> None:
        self.size = (side, side)

    def read(self, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        x0, y0, x1, y1 = box
        y, x = np.mgrid[y0:y1, x0:x1]
        star = ((y % 250) < 12) & ((x % 250) < 12)
        code = np.where(star, (y // 250 * (self.size[1] // 250) + x // 250) + 1, 0)
        return np.stack([star.astype(int), code // 256, code % 256], -1).astype(np.uint8)


@pytest.mark.slow
def test_memory_is_that_of_tiles_and_objects_not_of_the_image() -> None:
    peaks = []
    for side in (2000, 8000):
        tracemalloc.start()
        found = merged(Seer(), Stars(side), 512, 0.2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) == (side // 250) ** 2
        assert {int(coco_mask.area(encoded)) for encoded in found.rles} == {144}  # a list of 256 is too long for it
    assert peaks[1] - peaks[0] < 16 * 2**20, "the image has 192 MB"


class Corner:
    """Sees tiles as black but the last, which has one object; pixels are a token of the tile's place."""

    def stream(self, images: Iterator[NDArray[np.uint8]], **_: object) -> Iterator[Instances]:
        for token in images:
            mask = np.zeros((1024, 1024), np.uint8, order="F")
            if token.all():
                mask[1013:1017, 1014:1017] = 1
            rles = [coco_mask.encode(mask)] if mask.any() else []
            count = len(rles)
            yield Instances(0, np.full(count, 7), np.full(count, 0.9), rles, tight_boxes(rles), (1024, 1024))


class Dark:
    """20,000 x 20,000 pixels, of which only each tile's corner is returned."""

    size = (20_000, 20_000)

    def read(self, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        return np.array([[[box[2] == 20_000 and box[3] == 20_000]]], np.uint8)


def test_an_object_of_an_image_of_400_million_pixels_is_recorded_where_it_is(tmp_path: Path) -> None:
    found = merged(Corner(), Dark(), 1024, 0.2)
    record = record_of("a.tif", found)
    assert (record.height, record.width) == (20_000, 20_000)
    assert [(entry["area"], entry["bbox"]) for entry in record.instances] == [(12, [19_990, 19_989, 3, 4])]
    write_dataset([record], tmp_path, {7: "cell"})
    (annotation,) = json.loads((tmp_path / "_annotations.coco.json").read_text(encoding="utf-8"))["annotations"]
    (polygon,) = annotation["segmentation"]
    assert (min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])) == (
        19_990,
        19_989,
        19_993,
        19_993,
    )
