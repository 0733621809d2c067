"""Images that are the same picture: equal pixels, or thumbnails that correlate whatever the size and format."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from m2f_trainer.data.images import check_size, open_image, open_stored
from m2f_trainer.errors import ImageError
from m2f_trainer.masks.rle import Size

Vector: TypeAlias = npt.NDArray[np.float32]

_SIDE = 16  # of the thumbnail that is compared
_ALIKE = 0.997  # correlation from which two thumbnails are one picture
_FLAT = 1.0  # grey levels of standard deviation below which a thumbnail shows nothing
_BLOCK = 1024
_GRID, _LONGEST = 32, 512  # cells a side, and pixels a side that they are taken from, where two images are compared
_APART = 10.0  # grey levels: copies at JPEG quality 10, or half the size, stay below; objects of a cell's size don't
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Look:
    """What one image file is like: Pillow's mode, EXIF orientation, a digest of its pixels, a grey thumbnail."""

    mode: str
    orientation: int
    digest: bytes
    thumbnail: Vector  # (256,), zero mean and unit length; all zeros where there is nothing to see


@dataclass(frozen=True)
class BadImage:
    """Why an image can't be used: a kind of finding and its message."""

    kind: str
    message: str


def look(source: Mapping[str, Any], where: str, size: Size) -> Look | BadImage:
    """Reads a whole image; `size` is the (height, width) its annotations say."""
    try:
        stored = open_stored(source, where)
        mode = stored.mode
        image = open_image(stored, where)
    except ImageError as error:
        return BadImage("missing-image" if "No such file" in str(error) else "bad-image", str(error))
    try:
        check_size((image.height, image.width), size, where)
    except ImageError as error:
        return BadImage("wrong-image-size", str(error))
    digest = hashlib.blake2b(image.tobytes() + repr(image.size).encode(), digest_size=16).digest()
    return Look(mode, _orientation_of(stored), digest, thumbnail(image))


def thumbnail(image: Image.Image) -> Vector:
    """The image as a unit vector of its coarse greys, (256,)."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    greys = np.asarray(small, dtype=np.float32).reshape(-1)
    if greys.std() < _FLAT:
        return np.zeros_like(greys)
    centred = greys - greys.mean()
    return np.asarray(centred / np.linalg.norm(centred), dtype=np.float32)


def same_in_detail(first: Image.Image, other: Image.Image) -> bool:
    """Whether nothing sets two images that look the same apart that could be an object: no cell of a grid differs by
    `_APART` levels, brightness and contrast aside. Frames of a camera that stands still look the same, too.
    """
    size = min(first.width, other.width, _LONGEST), min(first.height, other.height, _LONGEST)
    cells = [_cells(image.convert("L").resize(size, Image.Resampling.BILINEAR)) for image in (first, other)]
    one, two = (values - values.mean() for values in cells)
    fitted = one * (one @ two / max(one @ one, 1e-9))
    return bool(np.abs(two - fitted).max() < _APART)


def _cells(image: Image.Image) -> Vector:
    small = image.resize((_GRID, _GRID), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32).reshape(-1)  # (1024,)


def same_pictures(looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, of images that show the same, each j with its first i only."""
    first_of: dict[bytes, int] = {}
    copies = {j: i for j, one in enumerate(looks) if (i := first_of.setdefault(one.digest, j)) != j}
    vectors = np.stack([one.thumbnail for one in looks]) if looks else np.zeros((0, _SIDE**2), dtype=np.float32)
    for start in range(0, len(looks), _BLOCK):
        likeness = vectors[start : start + _BLOCK] @ vectors.T  # (block, n)
        for row, column in np.argwhere(likeness > _ALIKE).tolist():
            if column < start + row:
                copies.setdefault(start + row, column)
    yield from ((i, j) for j, i in sorted(copies.items()))


def _orientation_of(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (ValueError, TypeError, OSError, SyntaxError, KeyError):
        return 1  # damaged EXIF turns nothing
