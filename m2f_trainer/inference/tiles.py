"""Merge the instances of an image's overlapping tiles, so that every object is found once and whole.

An instance of a tile is a piece. It is *cut* if it touches an edge of its tile inside the image, *complete* otherwise.
Complete pieces are objects; of two that overlap, the one with the higher score is kept (non-maximum suppression). A cut
piece that lies in such an object is part of it and is dropped. The remaining cut pieces of neighbouring tiles that
agree inside the overlap of the tiles form one object, which no tile contains whole: it is stitched from each tile's
mask inside the tile's core. A cut piece without a partner is kept, at a lower score, if most of it lies in its tile's
core; otherwise it is dropped, since a neighbouring tile contains more of it and found nothing.

Pieces are packed bitmaps of one bit per pixel, cropped to their boxes: memory grows with the objects, not N x H x W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from m2f_trainer.data.tiles import Tile, Tiling
from m2f_trainer.inference.instances import Instances, tight_boxes
from m2f_trainer.masks import rle
from m2f_trainer.masks.rle import Box, Size, box_area, encode_runs, intersection, union

SAME_OBJECT = 0.5
"""IoU above which two pieces are the same object; for cut pieces, the IoU inside the overlap of their tiles."""

COVERED = 0.5
"""Fraction of a cut piece above which it is part of the object that covers it."""

CUT_SCORE = 0.3
"""Factor on the score of a cut piece without a partner."""

CANDIDATES = 0.02
"""Class probability above which instances of tiles are merged; a higher threshold of scores applies to merged ones."""

_ENCODED_AT_ONCE = 1000


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """An instance of one tile, in the image's frame and cropped to its box."""

    tile: int
    category_id: int
    score: float
    box: Box
    area: int
    packed: NDArray[np.uint8]  # of np.packbits

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The bitmap (y1 - y0, x1 - x0), unpacked at each call."""
        x0, y0, x1, y1 = self.box
        return np.unpackbits(self.packed, count=box_area(self.box)).view(np.bool_).reshape(y1 - y0, x1 - x0)

    def within(self, box: Box) -> NDArray[np.bool_]:
        """The mask inside a box of the image that intersects the piece's."""
        x0, y0, x1, y1 = intersection(self.box, box)
        left, top = self.box[:2]
        return self.mask[y0 - top : y1 - top, x0 - left : x1 - left]


class Merger:
    """Collect the instances of tiles, and return an image's merged instances when its last tile is added."""

    def __init__(self, tiling: Tiling, limit: int | None = None) -> None:
        """`limit` is the maximum number of instances per image; by default there is none."""
        self.tiling, self.limit = tiling, limit
        self._open: dict[int, tuple[list[Tile], set[int], list[Piece]]] = {}  # tiles, those to come, pieces

    def add(self, found: Instances, number: int, size: Size) -> Instances | None:
        """Add those of tile `number` of image `found.image_id`; `size` is the image's, the masks the tile's."""
        if found.image_id not in self._open:
            laid = self.tiling.lay(size)
            self._open[found.image_id] = laid, set(range(len(laid))), []
        tiles, missing, pieces = self._open[found.image_id]
        pieces += _pieces_of_tile(number, tiles[number], found)
        missing.remove(number)
        if missing:
            return None
        del self._open[found.image_id]
        return merge_pieces(found.image_id, tiles, pieces, size, self.limit)

    def add_batch(self, found: Sequence[Instances], tiles: Sequence[Sequence[int]]) -> list[Instances]:
        """Add several; `tiles` has for each the tile's index, -1 for a blank one, and the image's height and width.

        Returns:
            the merged instances of the images that are complete
        """
        places = zip(found, tiles, strict=True)
        added = (self.add(one, number, (height, width)) for one, (number, height, width) in places if number >= 0)
        return [one for one in added if one is not None]


def merge_pieces(
    image_id: int, tiles: Sequence[Tile], pieces: Iterable[Piece], size: Size, limit: int | None = None
) -> Instances:
    """Merge the pieces of an image of (height, width) `size`; return the `limit` best instances."""
    cell = max(tiles[0].box[2:])
    of_tile = [Objects(cell) for _ in tiles]
    for piece in by_score(pieces):
        of_tile[piece.tile].add(piece)
    found, cut = Objects(cell), []
    for piece in by_score(piece for several in of_tile for piece in several.pieces):
        if _is_cut(piece, tiles[piece.tile].box, size):
            cut.append(piece)
        else:
            found.add(piece)
    groups = group_pieces(tiles, [piece for piece in cut if not found.covers(piece)])
    joined = [_stitch(tiles, group) for group in groups if len(group) > 1]
    for piece in by_score(piece for piece in joined if piece is not None):
        found.add(piece)
    for (piece,) in (group for group in groups if len(group) == 1):
        if 2 * piece.within(tiles[piece.tile].core).sum() >= piece.area and not found.covers(piece):
            found.add(replace(piece, score=CUT_SCORE * piece.score))
    objects = by_score(found.pieces)[:limit]
    rles = [{"size": list(size), "counts": counts} for counts in _encode(objects, size)]
    categories = np.array([piece.category_id for piece in objects], np.int64)
    scores = np.array([piece.score for piece in objects], np.float64)
    return Instances(image_id, categories, scores, rles, tight_boxes(rles), size)


def by_score(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces in descending order of score."""
    return sorted(pieces, key=lambda piece: -piece.score)


class Objects:
    """Pieces that are separate objects, indexed by the square cells of `cell` pixels that their boxes intersect."""

    def __init__(self, cell: int) -> None:
        self.cell = cell
        self.pieces: list[Piece] = []
        self._near: dict[tuple[int, int, int], list[int]] = {}

    def add(self, piece: Piece) -> None:
        """Add a piece, unless it duplicates an object that is already present."""
        if all(common <= SAME_OBJECT * (piece.area + other.area - common) for other, common in self._meeting(piece)):
            for cell in self._cells(piece):
                self._near.setdefault(cell, []).append(len(self.pieces))
            self.pieces.append(piece)

    def covers(self, piece: Piece) -> bool:
        """Whether more than `COVERED` of a piece lies in one of the objects."""
        return any(common > COVERED * piece.area for _, common in self._meeting(piece))

    def _cells(self, piece: Piece) -> Iterator[tuple[int, int, int]]:
        x0, y0, x1, y1 = piece.box
        columns, rows = (
            range(x0 // self.cell, (x1 - 1) // self.cell + 1),
            range(y0 // self.cell, (y1 - 1) // self.cell + 1),
        )
        return ((piece.category_id, row, column) for row, column in product(rows, columns))

    def _meeting(self, piece: Piece) -> Iterator[tuple[Piece, int]]:
        """The objects of the piece's class whose boxes intersect its own, with the number of shared pixels."""
        for place in {place for cell in self._cells(piece) for place in self._near.get(cell, ())}:
            other = self.pieces[place]
            shared = intersection(piece.box, other.box)
            if box_area(shared):
                yield other, int(np.count_nonzero(piece.within(shared) & other.within(shared)))


def _is_cut(piece: Piece, tile: Box, size: Size) -> bool:
    """Whether a piece touches an edge of its tile that isn't the image's."""
    (x0, y0, x1, y1), (left, top, right, bottom) = piece.box, tile
    height, width = size
    return x0 <= left > 0 or y0 <= top > 0 or x1 >= right < width or y1 >= bottom < height


def _pieces_of_tile(number: int, tile: Tile, instances: Instances) -> Iterator[Piece]:
    """A tile's instances, moved to the image's frame."""
    left, top = tile.box[:2]
    for category_id, score, encoded in zip(instances.category_ids, instances.scores, instances.rles, strict=True):
        runs = rle.read_runs(encoded["counts"], *instances.size)
        x0, y0, x1, y1 = rle.box_of(runs, instances.size[0])
        if x1 > x0:
            packed = np.packbits(rle.paint(runs, (x0, y0, x1, y1), instances.size[0]))
            box = (left + x0, top + y0, left + x1, top + y1)
            yield Piece(number, int(category_id), float(score), box, rle.area(runs), packed)


def group_pieces(tiles: Sequence[Tile], pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Group the pieces of one object; a group has at most one piece per tile.

    Pairs are joined in descending order of agreement, so that a piece is joined to its best match.
    """
    of_tile: list[list[Piece]] = [[] for _ in tiles]
    for piece in pieces:
        of_tile[piece.tile].append(piece)
    group = {id(piece): [piece] for piece in pieces}
    for _, first, second in sorted(_pairs(tiles, of_tile), key=lambda pair: -pair[0]):
        one, other = group[id(first)], group[id(second)]
        if {piece.tile for piece in one}.isdisjoint(piece.tile for piece in other):
            one += other
            group.update((id(piece), one) for piece in other)
    return list({id(members): members for members in group.values()}.values())


def _pairs(tiles: Sequence[Tile], pieces: Sequence[Sequence[Piece]]) -> Iterator[tuple[float, Piece, Piece]]:
    """Pairs of pieces of neighbouring tiles that agree, with their agreement, for tiles listed row by row."""
    across = sum(tile.box[1] == tiles[0].box[1] for tile in tiles)
    for number, tile in enumerate(tiles):
        later = {number + 1, *(number + across + step for step in (-1, 0, 1))}
        for other in (one for one in sorted(later) if number < one < len(tiles)):
            shared = intersection(tile.box, tiles[other].box)
            if not box_area(shared):
                continue
            near = [[p for p in pieces[k] if box_area(intersection(p.box, shared))] for k in (number, other)]
            for first, second in product(*near):
                overlap = agreement(first, second, shared) if first.category_id == second.category_id else 0.0
                if overlap > SAME_OBJECT:
                    yield overlap, first, second


def agreement(first: Piece, second: Piece, shared: Box) -> float:
    """The IoU of two pieces inside the overlap of their tiles."""
    both = intersection(intersection(first.box, second.box), shared)
    if not box_area(both):
        return 0.0
    common = int((first.within(both) & second.within(both)).sum())
    total = int(first.within(shared).sum()) + int(second.within(shared).sum()) - common
    return common / total if total else 0.0


def _stitch(tiles: Sequence[Tile], group: Sequence[Piece]) -> Piece | None:
    """Stitch each tile's mask inside its core; the score is the mean, weighted by the area that each piece contributes.

    None if no piece has a pixel in its tile's core.
    """
    boxes = [intersection(piece.box, tiles[piece.tile].core) for piece in group]
    areas = [int(piece.within(box).sum()) if box_area(box) else 0 for piece, box in zip(group, boxes, strict=True)]
    used = [(piece, box) for piece, box, area in zip(group, boxes, areas, strict=True) if area]
    if not used:
        return None
    x0, y0, x1, y1 = union([box for _, box in used])
    mask = np.zeros((y1 - y0, x1 - x0), np.bool_)
    for piece, box in used:
        mask[box[1] - y0 : box[3] - y0, box[0] - x0 : box[2] - x0] = piece.within(box)
    score = sum(area * piece.score for piece, area in zip(group, areas, strict=True)) / sum(areas)
    return Piece(-1, group[0].category_id, score, (x0, y0, x1, y1), sum(areas), np.packbits(mask))


def _encode(objects: Sequence[Piece], size: Size) -> Iterator[bytes]:
    """COCO's compressed RLE of each object, in chunks: encoding takes many times their memory."""
    for start in range(0, len(objects), _ENCODED_AT_ONCE):
        yield from encode_runs([to_runs(piece, size) for piece in objects[start : start + _ENCODED_AT_ONCE]])


def to_runs(piece: Piece, size: Size) -> NDArray[np.int64]:
    """Run lengths of a piece's mask in the whole image, column-major, background first."""
    x0, y0, x1, y1 = piece.box
    stride = y1 - y0 + 1  # each column ends with a background cell
    flat = np.zeros((x1 - x0) * stride + 1, np.bool_)
    flat[1:].reshape(x1 - x0, stride)[:, :-1] = piece.mask.T
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), stride)
    edges = (x0 + column) * size[0] + y0 + row
    runs: NDArray[np.int64] = np.diff(edges, prepend=0, append=size[0] * size[1])
    return rle.merge_empty_runs(runs)
