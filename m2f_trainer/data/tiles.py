"""Square tiles of `tile_size` original pixels, each resized to the model's frame, which enlarges small objects.

Training: a grid of adjacent tiles covers each image, and each tile is sampled once per epoch. The grid is shifted by a
random fraction of a tile, a function of (seed, epoch, image) only, so that objects are cut at other places each time.
Tiles without objects are a fixed fraction of an epoch, and are cycled through over the epochs. Evaluation and
prediction: overlapping tiles at the same scale (`lay_tiles`), whose instances `inference.tiles` merges.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Sampler

from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import Category
from m2f_trainer.data.geometry import Crop, Frames, Pixels, crop_image, in_crop
from m2f_trainer.data.transforms import Row, Sample, TrainTransform, pad, read_image, target_boxes, targets
from m2f_trainer.errors import RecipeError
from m2f_trainer.masks.rle import Box, Size
from m2f_trainer.model.mask2former import M2FConfig

RECENT_PIXELS = 2**26
"""Total size of the decoded images that a data worker keeps, in pixels: 256 MB, because Pillow stores 4 bytes each."""

LEAST_VISIBLE = 0.1
"""Smallest visible fraction of an object in a training tile; see `geometry.Crop`."""


@dataclass(frozen=True)
class Tile:
    """A tile's box in the image (x0, y0, x1, y1), and its core inside the box: the cores partition the image."""

    box: Box
    core: Box


def lay_tiles(size: Size, side: int, overlap: float) -> list[Tile]:
    """Tiles of `side` pixels, row by row, sharing at least the `overlap` of a side with their neighbours.

    >>> [one.box for one in lay_tiles((100, 180), 100, 0.2)]
    [(0, 0, 100, 100), (80, 0, 180, 100)]

    Raises:
        RecipeError: the overlap isn't within 0 and 0.5, where three tiles would meet.
    """
    if side < 1 or not 0 <= overlap < 0.5:
        raise RecipeError(
            f"expected a tile of at least 1 pixel and an overlap from 0 to below 0.5, got {side}, {overlap}"
        )
    rows, columns = (_lay_line(length, side, overlap) for length in size)
    return [
        Tile((x[0], y[0], x[1], y[1]), (core_x[0], core_y[0], core_x[1], core_y[1]))
        for (y, core_y), (x, core_x) in product(rows, columns)
    ]


def _lay_line(length: int, tile: int, overlap: float) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Start and end of each tile along one axis, and of its core."""
    side = min(tile, length)
    shared = min(side - 1, math.ceil(tile * overlap)) if side > 1 else 0
    count = max(1, math.ceil((length - shared) / (side - shared)))
    starts = [round(index * (length - side) / max(1, count - 1)) for index in range(count)]
    cuts = [0, *((start + before + side) // 2 for before, start in pairwise(starts)), length]
    return [((start, start + side), (cuts[index], cuts[index + 1])) for index, start in enumerate(starts)]


# training


@dataclass(frozen=True)
class Cell:
    """One tile of the grid of `rows` x `columns` over image number `image`; `filled` if it contains an object."""

    image: int
    rows: int
    columns: int
    row: int
    column: int
    filled: bool


class TileGrid:
    """The tiles of an epoch: of each image those that contain objects, and a fraction of all images' empty ones.

    If there are more than the limit they are cycled through in a fixed random order: each epoch continues where the
    one before stopped.
    """

    def __init__(self, rows: datasets.Dataset, side: int, empty: float, limit: int | None = None) -> None:
        """`rows` as `load_coco` has them; `empty`, below 1, is the maximum fraction of tiles without objects;
        `limit` is the maximum number of tiles with objects per image and epoch.
        """
        order = np.random.default_rng(0)
        cells: list[NDArray[np.int64]] = []  # (n, 5) of each image: its number, rows, columns, row, column
        counts: list[NDArray[np.int64]] = []
        for image, (size, boxes) in enumerate(sizes_and_boxes(rows)):
            down, across = (math.ceil(length / side) for length in size)
            grid = np.indices((down, across)).reshape(2, -1).T  # (n, 2)
            cells.append(np.column_stack([np.tile([image, down, across], (len(grid), 1)), grid]))
            counts.append(count_inside(boxes, size, side, (down, across)).reshape(-1))
        self.cells, self.counts = np.concatenate(cells), np.concatenate(counts)
        filled = order.permutation(np.flatnonzero(self.counts))
        groups = [group for group in _by_image(filled, self.cells[filled, 0]) if len(group)]
        self.cycles = [_Cycle(group, min(len(group), limit or len(group))) for group in groups]
        total = sum(cycle.per_epoch for cycle in self.cycles)
        empty_tiles = order.permutation(np.flatnonzero(self.counts == 0))
        self.cycles.append(_Cycle(empty_tiles, min(len(empty_tiles), round(total * empty / (1 - empty)))))
        self.starts = np.cumsum([0, *(cycle.per_epoch for cycle in self.cycles)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def cell(self, index: int, epoch: int) -> Cell:
        """Tile `index` of an epoch: image after image, then those without objects."""
        group = int(np.searchsorted(self.starts, index, "right")) - 1
        tile = self.cycles[group].tile(index - int(self.starts[group]), epoch)
        image, rows, columns, row, column = self.cells[tile].tolist()
        return Cell(image, rows, columns, row, column, bool(self.counts[tile]))

    def tiles(self, epoch: int) -> NDArray[np.int64]:
        """Index of each tile of an epoch in `cells`, which lists all tiles of all images."""
        return np.concatenate([cycle.of_epoch(epoch) for cycle in self.cycles])

    def shares(self) -> NDArray[np.float64]:
        """Average number of times that an epoch shows each tile of `cells`."""
        shares = np.zeros(len(self.cells))
        for cycle in self.cycles:
            shares[cycle.tiles] = cycle.per_epoch / max(len(cycle.tiles), 1)
        return shares


@dataclass(frozen=True, eq=False)
class _Cycle:
    """Tile numbers that are cycled through, `per_epoch` of them in each epoch."""

    tiles: NDArray[np.int64]
    per_epoch: int

    def tile(self, index: int, epoch: int) -> int:
        return int(self.tiles[(epoch * self.per_epoch + index) % len(self.tiles)])

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """The `per_epoch` tile numbers of an epoch."""
        return self.tiles[(epoch * self.per_epoch + np.arange(self.per_epoch)) % max(len(self.tiles), 1)]


def _by_image(tiles: NDArray[np.int64], images: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The tiles of each image, in their order."""
    order = np.argsort(images, kind="stable")
    return np.split(tiles[order], np.flatnonzero(np.diff(images[order])) + 1)


def sizes_and_boxes(rows: datasets.Dataset) -> Iterator[tuple[Size, NDArray[np.float64]]]:
    """Each row's (height, width), and its objects' boxes (N, 4), x0, y0, x1, y1, computed from the masks."""
    columns = rows.select_columns(["height", "width", "objects"]).with_format(None)
    for row in columns:
        yield (row["height"], row["width"]), target_boxes(row)


def count_inside(boxes: NDArray[np.float64], size: Size, side: int, grid: Size) -> NDArray[np.int64]:
    """The number of boxes (N, 4) that intersect each tile of an unshifted grid, (rows, columns)."""
    meets = []
    for axis, (length, count) in enumerate(zip(size, grid, strict=True)):
        starts = _starts((np.arange(count) + 0.5) / count * length, side, length)  # (count,)
        low, high = boxes[:, 1 - axis], boxes[:, 3 - axis]
        meets.append((low[:, None] < starts + side) & (high[:, None] > starts))  # (N, count)
    down, across = meets
    return np.asarray(np.einsum("nr,nc->rc", down.astype(np.int64), across.astype(np.int64)))


def _starts(centres: Any, side: float, length: float) -> Any:
    """Start of each window along an axis: centred, then clipped to the image."""
    return np.clip(centres - side / 2, 0, max(0.0, length - side))


class RecentImages:
    """The images that this process read last: the last one, and others up to `limit` pixels in all."""

    def __init__(self, limit: int) -> None:
        self.limit, self.pixels = limit, 0
        self._images: OrderedDict[int, Image.Image] = OrderedDict()

    def __reduce__(self) -> tuple[type["RecentImages"], tuple[int]]:
        """Without its images: a data worker reads its own."""
        return RecentImages, (self.limit,)

    def __repr__(self) -> str:
        """The same in every process: kept features are found by the settings of their transform."""
        return f"RecentImages({self.limit})"

    def read(self, row: Row, replace: bool = True) -> Image.Image:
        """As `read_image`. The image must not be changed. Without `replace` it is kept only if there is room for it."""
        key: int = row["image_id"]
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        image = read_image(row)
        size = image.width * image.height
        if not replace and self.pixels + size > self.limit:
            return image
        self._images[key] = image
        self.pixels += size
        while len(self._images) > 1 and self.pixels > self.limit:
            _, oldest = self._images.popitem(last=False)
            self.pixels -= oldest.width * oldest.height
        return image


class TileOrder(Sampler[int]):
    """The samples of the dataset's epoch in a random order that lets `RecentImages` read each image about once.

    The images are shuffled and divided into groups of `limit` pixels; the samples of a group are shuffled together, and
    the groups follow one another. The order is a function of (seed, epoch).
    """

    def __init__(self, dataset: InstanceDataset, seed: int, limit: int = RECENT_PIXELS) -> None:
        self.dataset, self.seed, self.limit = dataset, seed, limit
        self.pixels = np.asarray(dataset.rows["height"]) * np.asarray(dataset.rows["width"])  # of each image

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        """The samples of the epoch that is set when the first one is asked for."""
        epoch = self.dataset.epoch
        rng = np.random.default_rng([self.seed, epoch, 2])  # the tiles' shifts are drawn from other streams
        shuffled = rng.permutation(len(self.pixels))
        groups = np.empty(len(shuffled), np.int64)
        groups[shuffled] = (np.cumsum(self.pixels[shuffled]) - self.pixels[shuffled]) // self.limit
        images = self.dataset.images(epoch)
        yield from np.lexsort((rng.random(len(images)), groups[images])).tolist()


class TileTransform(TrainTransform):
    """`TrainTransform` for tiles: the frame covers `side` original pixels, times the jitter of lsj_min_ and _max_scale.

    A row's `cell` is its tile; a row without one is cropped at a random position. The frame must be square.
    """

    def __init__(self, image_height: int, image_width: int, side: int, **settings: Any) -> None:
        super().__init__(image_height, image_width, **settings)
        self.side = side
        self.recent = RecentImages(RECENT_PIXELS)

    def read(self, row: Row, crop: Crop) -> Image.Image:
        """As `TrainTransform.read`. Images are kept, unless a JPEG may be decoded at a smaller size.

        `TileOrder` doesn't order the images that copy-paste uses: they don't replace those of the tiles.
        """
        reduced = 2 * crop.resized[0] <= crop.original[0] or 2 * crop.resized[1] <= crop.original[1]
        return super().read(row, crop) if reduced else self.recent.read(row, replace="cell" in row)

    def random_crop(self, row: Row, epoch: int, rng: np.random.Generator) -> Crop:
        """The cell with the grid shift of this epoch and image; unshifted if the crop would contain no object."""
        quarter_turns = int(rng.integers(4)) if self.rotate90 else 0
        scale = self.size[0] / self.side * rng.uniform(*self.scales)
        flip = bool(rng.random() < 0.5) and self.flip
        cell: Cell | None = row.get("cell")
        shifts = np.random.default_rng([self.seed, epoch, cell.image, 1]) if cell else rng
        crop = self._window(row, cell, shifts.uniform(-0.5, 0.5, size=2).tolist(), scale)
        if cell is not None and cell.filled and not in_crop(target_boxes(row), crop).any():
            crop = self._window(row, cell, (0.0, 0.0), scale)
        return Crop(crop.original, crop.resized, crop.window, flip, quarter_turns, LEAST_VISIBLE)

    def _window(self, row: Row, cell: Cell | None, shift: Sequence[float], scale: float) -> Crop:
        """The window around a cell's centre, shifted by a fraction of the cell's height and width."""
        original = (row["height"], row["width"])
        resized = (max(1, round(original[0] * scale)), max(1, round(original[1] * scale)))
        place = ((cell.row, cell.rows), (cell.column, cell.columns)) if cell else ((0, 1), (0, 1))
        y0, x0 = (
            round(float(_starts((number + 0.5 + moved) / count * length, side, length)))
            for (number, count), moved, length, side in zip(place, shift, resized, self.size, strict=True)
        )
        return Crop(original, resized, (x0, y0, min(resized[1], x0 + self.size[1]), min(resized[0], y0 + self.size[0])))


class TrainTiles(InstanceDataset):
    """The tiles of a training split in the order of `TileGrid`; `transform` is a `TileTransform`."""

    def __init__(
        self,
        rows: datasets.Dataset,
        transform: TileTransform,
        categories: Sequence[Category],
        empty: float = 0.0,
        limit: int | None = None,
    ) -> None:
        super().__init__(rows, transform, categories)
        self.side = transform.side
        self.grid = TileGrid(rows, transform.side, empty, limit)

    def __len__(self) -> int:
        return len(self.grid)

    def row(self, index: int, epoch: int) -> Row:
        """The image's row with its cell."""
        cell = self.grid.cell(index, epoch)
        return {**self.rows[cell.image], "cell": cell}

    def objects(self) -> NDArray[np.int64]:
        """The number of objects in each tile of the first epoch, before the grid is shifted."""
        return self.grid.counts[self.grid.tiles(0)]

    def unit_classes(self) -> NDArray[np.int64]:
        """Every pair of a tile of the unshifted grid and a class that has objects in it, (P, 2)."""
        columns = self.rows.select_columns(["height", "width", "objects"]).with_format(None)
        starts = np.searchsorted(self.grid.cells[:, 0], np.arange(len(self.rows)))
        found = [np.zeros((0, 2), np.int64)]
        for row, start in zip(columns, starts.tolist(), strict=True):
            boxes, classes = target_boxes(row), np.array([self.class_of[one["category_id"]] for one in targets(row)])
            size, (down, across) = (row["height"], row["width"]), self.grid.cells[start, 1:3].tolist()
            for k in np.unique(classes).tolist():
                inside = count_inside(boxes[classes == k], size, self.side, (down, across)).reshape(-1)
                tiles = start + np.flatnonzero(inside)
                found.append(np.column_stack([tiles, np.full(len(tiles), k)]))
        return np.concatenate(found)

    def images(self, epoch: int) -> NDArray[np.int64]:
        """As `InstanceDataset`."""
        images: NDArray[np.int64] = self.grid.cells[self.units(epoch), 0]
        return images

    def units(self, epoch: int) -> NDArray[np.int64]:
        """The tile of each sample of an epoch."""
        return self.grid.tiles(epoch)

    def shares(self) -> NDArray[np.float64]:
        """Average number of times that an epoch shows each tile."""
        return self.grid.shares()


# evaluation and prediction


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles of `side` original pixels that are resized to the model's `frame` (H, W)."""

    side: int
    overlap: float
    frame: Size

    def lay(self, size: Size) -> list[Tile]:
        """The tiles of an image. Raises RecipeError as `lay_tiles`."""
        return lay_tiles(size, self.side, self.overlap)

    def prepare(self, pixels: Pixels) -> tuple[torch.Tensor, torch.Tensor, Frames]:
        """A tile's RGB (h, w, 3) -> pixel_values uint8 (3, H, W), pixel_mask bool (H, W), and the sizes."""
        size, scale = (pixels.shape[0], pixels.shape[1]), min(self.frame) / self.side
        height, width = (max(1, round(length * scale)) for length in size)
        crop = Crop(size, (height, width), (0, 0, width, height))
        return *pad(crop_image(Image.fromarray(pixels), crop), crop, self.frame), Frames(size, crop.resized, self.frame)


def tiling_of(config: M2FConfig) -> Tiling | None:
    """The tiling of a model in evaluation and prediction; None for whole images."""
    frame = (config.image_height, config.image_width)
    return Tiling(config.tile_size, config.tile_overlap, frame) if config.tile_size else None


class EvalTiles(InstanceDataset):
    """One rank's tiles of a split's images, in order; all tiles of an image are on the same rank.

    A sample is as an `InstanceDataset`'s, without objects. Its `original_size` is the tile's. `tile` int64 (3,) is the
    tile's index in its image, or -1 for a blank tile that makes the number of batches equal on all ranks, and the
    image's height and width.
    """

    def __init__(self, rows: datasets.Dataset, tiling: Tiling, categories: Sequence[Category]) -> None:
        super().__init__(rows, self._show, categories)
        self.tiling = tiling
        self._images = rows.remove_columns("objects")
        self._tiles = [tiling.lay(size) for size in zip(rows["height"], rows["width"], strict=True)]
        self._cached: tuple[int, Pixels] | None = None
        self.shard(0, 1, 1)

    def shard(self, rank: int, world: int, batch_size: int) -> None:
        """Assign images to ranks: those with most tiles first, each to the rank with the fewest tiles so far."""
        shares: list[list[int]] = [[] for _ in range(world)]
        loads = [0] * world
        for image in sorted(range(len(self._tiles)), key=lambda image: -len(self._tiles[image])):
            least = loads.index(min(loads))
            shares[least].append(image)
            loads[least] += len(self._tiles[image])
        self._samples = [(image, tile) for image in sorted(shares[rank]) for tile in range(len(self._tiles[image]))]
        batches = max(math.ceil(load / batch_size) for load in loads)
        self._samples += [(0, -1)] * ((batches - 1) * batch_size + 1 - len(self._samples))

    def __len__(self) -> int:
        return len(self._samples)

    def row(self, index: int, epoch: int) -> Row:
        """The image's row without objects, its index in the split, and the tile's index in the image."""
        image, tile = self._samples[index]
        return {**self._images[image], "number": image, "tile": tile}

    def _show(self, row: Row, epoch: int, index: int, rows: Sequence[Row]) -> Sample:
        x0, y0, x1, y1 = self._tiles[row["number"]][max(0, row["tile"])].box
        blank = row["tile"] < 0
        pixels = np.zeros((y1 - y0, x1 - x0, 3), np.uint8) if blank else self._pixels(row)[y0:y1, x0:x1]
        values, valid, frames = self.tiling.prepare(pixels)
        return Sample(
            pixel_values=values,
            pixel_mask=valid,
            masks=[],
            boxes=torch.zeros((0, 4), dtype=torch.int32),
            category_ids=torch.zeros(0, dtype=torch.int64),
            image_id=row["image_id"],
            original_size=frames.original,
            resized_size=frames.resized,
            tile=(row["tile"], row["height"], row["width"]),
        )

    def _pixels(self, row: Row) -> Pixels:
        """The image (H, W, 3), cached until another image is requested: a data worker reads each image once."""
        if self._cached is None or self._cached[0] != row["number"]:
            self._cached = (row["number"], np.asarray(read_image(row)))
        return self._cached[1]
