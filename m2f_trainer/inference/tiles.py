"""Large images in overlapping tiles, with every object found once.

Two pieces of one class from neighbouring tiles are one object when their masks agree inside the tiles' overlap. Of the
tiles that see all its pieces whole, the one that sees most around them has the say. An object that every tile cuts is
put together: the overlaps are cut in the middle, and each tile gives what it saw in its own part. A piece without a
partner counts where most of it lies in its tile's own part; elsewhere a neighbour saw the place better and found
nothing.

Pieces are bitmaps of a bit a pixel, cropped to their boxes: memory follows the objects, never N x H x W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.errors import RecipeError
from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.inference.windows import Pixels, Windows
from m2f_trainer.masks import rle
from m2f_trainer.masks.rle import Box, Size, box_area, encode_runs, intersection, union

SAME_OBJECT = 0.5
"""The IoU inside two tiles' overlap above which two pieces are one object."""

_ENCODED_AT_ONCE = 1000


class Stream(Protocol):
    """What of a Predictor is used."""

    def stream(
        self, images: Iterator[Pixels], *, batch_size: int = 1, threshold: float = 0.5, top_k: int = 100
    ) -> Iterator[Instances]:
        """The instances of each image."""
        ...


@dataclass(frozen=True)
class Tile:
    """Where a tile lies, and the part of it that it has the say on."""

    box: Box
    own: Box


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """An instance as one tile saw it, inside its box of the image."""

    tile: int
    category_id: int
    score: float
    box: Box
    packed: NDArray[np.uint8]  # of np.packbits

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The bitmap (y1 - y0, x1 - x0), made afresh."""
        x0, y0, x1, y1 = self.box
        return np.unpackbits(self.packed, count=box_area(self.box)).view(np.bool_).reshape(y1 - y0, x1 - x0)

    def within(self, box: Box) -> NDArray[np.bool_]:
        """The mask inside a box of the image, which needs to meet the piece's."""
        x0, y0, x1, y1 = intersection(self.box, box)
        left, top = self.box[:2]
        return self.mask[y0 - top : y1 - top, x0 - left : x1 - left]


def lay_tiles(size: Size, tile: int, overlap: float) -> list[Tile]:
    """Tiles of `tile` pixels a side, row by row, sharing at least the `overlap` of a side with their neighbours.

    >>> [one.box for one in lay_tiles((100, 180), 100, 0.2)]
    [(0, 0, 100, 100), (80, 0, 180, 100)]

    Raises:
        RecipeError: the overlap isn't within 0 and 0.5, where three tiles would meet.
    """
    if tile < 1 or not 0 <= overlap < 0.5:
        raise RecipeError(
            f"expected a tile of at least 1 pixel and an overlap from 0 to below 0.5, got {tile}, {overlap}"
        )
    rows, columns = (_lay_line(side, tile, overlap) for side in size)
    return [
        Tile((x[0], y[0], x[1], y[1]), (own_x[0], own_y[0], own_x[1], own_y[1]))
        for (y, own_y), (x, own_x) in product(rows, columns)
    ]


def _lay_line(length: int, tile: int, overlap: float) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Start and end of each tile along one axis, and of its own part."""
    side = min(tile, length)
    shared = min(side - 1, math.ceil(tile * overlap)) if side > 1 else 0
    count = max(1, math.ceil((length - shared) / (side - shared)))
    starts = [round(index * (length - side) / max(1, count - 1)) for index in range(count)]
    cuts = [0, *((start + before + side) // 2 for before, start in pairwise(starts)), length]
    return [((start, start + side), (cuts[index], cuts[index + 1])) for index, start in enumerate(starts)]


def predict_tiled(
    predictor: Stream,
    image: Windows,
    tile: int,
    overlap: float = 0.2,
    *,
    batch_size: int = 1,
    threshold: float = 0.5,
) -> Instances:
    """The instances of a large image, predicted tile by tile and merged; image_id is 0.

    Raises:
        RecipeError: tile and overlap can't be laid out.
    """
    tiles = lay_tiles(image.size, tile, overlap)
    found = predictor.stream((image.read(one.box) for one in tiles), batch_size=batch_size, threshold=threshold)
    pieces = [list(_pieces(number, tiles[number], instances)) for number, instances in enumerate(found)]
    objects = [one for group in group_pieces(tiles, pieces) if (one := join(tiles, group, image.size)) is not None]
    objects.sort(key=lambda piece: -piece.score)
    rles = [{"size": list(image.size), "counts": counts} for counts in _encode(objects, image.size)]
    categories = np.array([piece.category_id for piece in objects], np.int64)
    scores = np.array([piece.score for piece in objects], np.float64)
    return Instances(0, categories, scores, rles, tight_boxes(rles), image.size)


def _pieces(number: int, tile: Tile, instances: Instances) -> Iterator[Piece]:
    """A tile's instances, moved to the image's frame."""
    left, top = tile.box[:2]
    for category_id, score, encoded in zip(instances.category_ids, instances.scores, instances.rles, strict=True):
        runs = rle.read_runs(encoded["counts"], *instances.size)
        x0, y0, x1, y1 = rle.box_of(runs, instances.size[0])
        if x1 > x0:
            packed = np.packbits(rle.paint(runs, (x0, y0, x1, y1), instances.size[0]))
            yield Piece(number, int(category_id), float(score), (left + x0, top + y0, left + x1, top + y1), packed)


def group_pieces(tiles: Sequence[Tile], pieces: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """The pieces of all tiles, those of one object together; a group has at most one piece a tile.

    Pairs are joined from the best agreement down, so that a piece goes to the neighbour's that fits it best.
    """
    group = {id(piece): [piece] for several in pieces for piece in several}
    for _, first, second in sorted(_pairs(tiles, pieces), key=lambda pair: -pair[0]):
        one, other = group[id(first)], group[id(second)]
        if {piece.tile for piece in one}.isdisjoint(piece.tile for piece in other):
            one += other
            group.update((id(piece), one) for piece in other)
    return list({id(members): members for members in group.values()}.values())


def _pairs(tiles: Sequence[Tile], pieces: Sequence[Sequence[Piece]]) -> Iterator[tuple[float, Piece, Piece]]:
    """Pieces of neighbouring tiles that agree, with their agreement. A tile's later neighbours are near in the list."""
    across = sum(tile.box[1] == tiles[0].box[1] for tile in tiles)
    for number, tile in enumerate(tiles):
        later = {number + 1, *(number + across + step for step in (-1, 0, 1))}
        for other in (one for one in later if number < one < len(tiles)):
            shared = intersection(tile.box, tiles[other].box)
            if not box_area(shared):
                continue
            near = [[p for p in pieces[k] if box_area(intersection(p.box, shared))] for k in (number, other)]
            for first, second in product(*near):
                overlap = agreement(first, second, shared) if first.category_id == second.category_id else 0.0
                if overlap > SAME_OBJECT:
                    yield overlap, first, second


def agreement(first: Piece, second: Piece, shared: Box) -> float:
    """The IoU of two pieces inside the part of the image that both their tiles see."""
    both = intersection(intersection(first.box, second.box), shared)
    if not box_area(both):
        return 0.0
    common = int((first.within(both) & second.within(both)).sum())
    total = int(first.within(shared).sum()) + int(second.within(shared).sum()) - common
    return common / total if total else 0.0


def join(tiles: Sequence[Tile], group: Sequence[Piece], size: Size) -> Piece | None:
    """One object of its pieces, as the module says; None where nothing is left. `size` is the image's."""
    if len(group) == 1:
        (piece,) = group
        own = piece.within(intersection(piece.box, tiles[piece.tile].own)).sum()
        return piece if 2 * own >= piece.mask.sum() else None
    margins = [_margin(union([piece.box for piece in group]), tiles[piece.tile].box, size) for piece in group]
    widest = max(margins)
    return group[margins.index(widest)] if widest > 0 else _stitch(tiles, group)


def _margin(box: Box, tile: Box, size: Size) -> float:
    """Pixels between a box and the next edge of a tile inside the image; 0 or less where the tile may cut the box."""
    x0, y0, x1, y1 = box
    left, top, right, bottom = tile
    gaps = (
        (y0 - top, top > 0),
        (bottom - y1, bottom < size[0]),
        (x0 - left, left > 0),
        (right - x1, right < size[1]),
    )
    return min((gap for gap, inside in gaps if inside), default=math.inf)


def _stitch(tiles: Sequence[Tile], group: Sequence[Piece]) -> Piece | None:
    """In each tile's own part what that tile saw; the score is the mean, weighted by what each piece contributes."""
    boxes = [intersection(piece.box, tiles[piece.tile].own) for piece in group]
    areas = [int(piece.within(box).sum()) if box_area(box) else 0 for piece, box in zip(group, boxes, strict=True)]
    used = [(piece, box) for piece, box, area in zip(group, boxes, areas, strict=True) if area]
    if not used:
        return None
    x0, y0, x1, y1 = whole = union([box for _, box in used])
    mask = np.zeros((y1 - y0, x1 - x0), np.bool_)
    for piece, box in used:
        mask[box[1] - y0 : box[3] - y0, box[0] - x0 : box[2] - x0] = piece.within(box)
    score = sum(area * piece.score for piece, area in zip(group, areas, strict=True)) / sum(areas)
    return Piece(-1, group[0].category_id, score, whole, np.packbits(mask))


def _encode(objects: Sequence[Piece], size: Size) -> Iterator[bytes]:
    """COCO's compressed run lengths of each object, some at a time: encoding takes many times their size."""
    for start in range(0, len(objects), _ENCODED_AT_ONCE):
        yield from encode_runs([to_runs(piece, size) for piece in objects[start : start + _ENCODED_AT_ONCE]])


def to_runs(piece: Piece, size: Size) -> NDArray[np.int64]:
    """Run lengths of a piece's mask in the whole image, column-major, background first."""
    x0, y0, x1, y1 = piece.box
    stride = y1 - y0 + 1  # a cell of background ends each column
    flat = np.zeros((x1 - x0) * stride + 1, np.bool_)
    flat[1:].reshape(x1 - x0, stride)[:, :-1] = piece.mask.T
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), stride)
    edges = (x0 + column) * size[0] + y0 + row
    runs: NDArray[np.int64] = np.diff(edges, prepend=0, append=size[0] * size[1])
    return rle.merge_empty_runs(runs)
