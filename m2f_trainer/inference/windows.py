"""Read windows of an image: of a TIFF only the tiles or strips needed, through tifffile; other files are decoded whole.

Pillow decodes a JPEG or PNG whole, so those must fit in half of the available memory. The same applies to a TIFF whose
colours tifffile does not convert (palettes, CMYK), whose values have more than 8 bits, or whose codec is not installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from m2f_trainer.config.arguments import PixelRange
from m2f_trainer.data.geometry import Pixels
from m2f_trainer.data.images import SEVERAL_PAGES, ImageSource, open_image, too_many_channels
from m2f_trainer.errors import ImageError, PixelRangeError, needs
from m2f_trainer.masks.rle import HIGHEST_LIMIT, Box, Size, max_pixels

_ORIENTATION = 274  # the tag
GREY, RGB, YCBCR = 1, 2, 6
JPEG = 7
ASSOCIATED = 1
"""Photometric interpretations, the one compression whose decoder makes RGB of YCbCr, and the kind of an extra sample
that is an alpha by which the colours are multiplied, as TIFF 6.0 numbers them."""

_BYTES_PER_PIXEL = 12  # while an image is decoded: as stored, as RGB with padding, and as an array

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Classic and BigTIFF, little and big endian."""


MOST_PIXELS, MOST_PIXELS_AT_ONCE = 10**11, 2**29
"""Limits of a TIFF that is read by windows, and of its tiles or strips, which are decoded whole. The largest pathology
slides have 4 x 10^10 pixels."""


class Windows(Protocol):
    """An image whose windows can be read as RGB, uint8 (h, w, 3)."""

    size: Size

    def read(self, box: Box) -> Pixels:
        """The pixels inside a box (x0, y0, x1, y1) of the image."""
        ...


class ArrayWindows:
    """An image in memory: uint8 (H, W, 3)."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.size: Size = (pixels.shape[0], pixels.shape[1])

    def read(self, box: Box) -> Pixels:
        """As `Windows.read`."""
        x0, y0, x1, y1 = box
        return self.pixels[y0:y1, x0:x1]


class TiffWindows:
    """A TIFF of 8-bit grey or colour; reading a window decodes the tiles or strips it intersects.

    Raises:
        ImageError: its first page is damaged, has other sample types or an orientation, or its compression isn't
            supported.
    """

    def __init__(self, path: Path) -> None:
        import tifffile

        self.path = path
        try:
            with tifffile.TiffFile(path) as file:
                self.page: Any = file.pages[0]
                if len(file.pages) > 1 and file.pages[1].shape[:2] == self.page.shape[:2]:
                    raise ImageError(f"{path}: {SEVERAL_PAGES}")
                self.decode = self.page.decode
        except ImageError:
            raise
        except Exception as error:  # tifffile raises many types for a damaged header
            raise ImageError(f"{path}: the TIFF's header is damaged ({error}). Replace the file.") from error
        self.size: Size = self._checked_size()
        self._check_pixels()
        self._decode(0)  # raises for a missing codec before any prediction

    def _checked_size(self) -> Size:
        page, shape = self.page, self.page.shape
        orientation = page.tags.get(_ORIENTATION)
        if orientation is not None and orientation.value != 1:
            raise ImageError(
                f"{self.path}: reading by windows takes images that are stored upright, got the orientation"
                f" {orientation.value}. Turn it, for instance with `vips autorot`."
            )
        if page.samplesperpixel > 4:
            raise ImageError(f"{self.path}: {too_many_channels(page.samplesperpixel)}")
        colours = page.photometric in (GREY, RGB) or (page.photometric == YCBCR and page.compression == JPEG)
        if page.dtype != np.uint8 or page.planarconfig != 1 or not colours or shape[2:] not in ((), (1,), (3,), (4,)):
            raise ImageError(
                f"{self.path}: reading by windows takes 8-bit grey, RGB or RGBA with interleaved channels, got "
                f"{shape} of {page.dtype}, colours {page.photometric!r}. Convert it, for instance with "
                "`vips tiffsave --tile`."
            )
        return int(shape[0]), int(shape[1])

    def _check_pixels(self) -> None:
        """Reject sizes that no scanner writes; a sparse file of a few bytes can declare any size."""
        (height, width), (rows, columns) = self.size, self._segment()
        for what, pixels, limit in (
            ("pixels", height * width, MOST_PIXELS),
            ("pixels in a tile or strip", rows * columns, MOST_PIXELS_AT_ONCE),
        ):
            if pixels > limit:
                raise ImageError(
                    f"{self.path}: expected at most {limit:,} {what}, got {pixels:,} ({width}x{height} in parts of "
                    f"{columns}x{rows}). Cut the image, or write it in tiles with `vips tiffsave --tile`."
                )

    def read(self, box: Box) -> Pixels:
        """As `Windows.read`."""
        x0, y0, x1, y1 = box
        height, width = self._segment()
        across = -(-self.size[1] // width)
        pixels = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
        for row in range(y0 // height, -(-y1 // height)):
            for column in range(x0 // width, -(-x1 // width)):
                part = self._decode(row * across + column)
                top, left = row * height, column * width
                rows = slice(max(y0, top), min(y1, top + part.shape[0]))
                columns = slice(max(x0, left), min(x1, left + part.shape[1]))
                seen = part[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
                pixels[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0] = seen
        return pixels

    def _segment(self) -> Size:
        """Height and width of a tile, or of a strip."""
        if self.page.is_tiled:
            return int(self.page.tilelength), int(self.page.tilewidth)
        return int(self.page.rowsperstrip), self.size[1]

    def _decode(self, index: int) -> Pixels:
        """One tile or strip as (h, w, 1 or 3)."""
        with self.path.open("rb") as file:
            file.seek(self.page.dataoffsets[index])
            data = file.read(self.page.databytecounts[index]) or None
        try:
            decoded, _, shape = self.decode(data, index, jpegtables=self.page.jpegtables)
        except Exception as error:  # each codec has its own exceptions
            codec = " pip install imagecodecs adds it." if "imagecodecs" in str(error) else " Replace the file."
            raise ImageError(f"{self.path}: part {index} of the TIFF can't be decoded ({error}).{codec}") from error
        if decoded is None:  # a sparse TIFF: the tile is empty
            return np.zeros((*shape[1:3], 1), np.uint8)
        pixels: Pixels = decoded.reshape(decoded.shape[-3:])[: shape[1], : shape[2]]
        if pixels.shape[2] == 4 and tuple(self.page.extrasamples) == (ASSOCIATED,):
            stored = Image.frombytes("RGBa", (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
            pixels = np.asarray(stored.convert("RGBA"))  # divided by alpha, as Pillow reads such files
        return pixels[..., :3]


def windows_of(image: ImageSource, where: str, pixel_range: PixelRange = None) -> Windows:
    """An image of any kind by windows. Raises as `open_windows` does; `where` names the image in messages."""
    if isinstance(image, (str, Path)):
        return open_windows(Path(image), pixel_range)
    return _whole_image(image, where, pixel_range)


def _whole_image(image: ImageSource, where: str, pixel_range: PixelRange) -> Windows:
    limit = max(max_pixels(), pixels_in_memory())
    return ArrayWindows(np.asarray(open_image(image, where, displayed=True, pixel_range=pixel_range, limit=limit)))


def pixels_in_memory() -> int:
    """The pixels of an image that can be decoded in half of the memory that is available."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return 0
    return min(available // 2 // _BYTES_PER_PIXEL, HIGHEST_LIMIT)


def open_windows(path: Path, pixel_range: PixelRange = None) -> Windows:
    """The image of a file, by windows where it is a TIFF that tifffile reads, else decoded whole.

    `pixel_range` is as of `open_image`.

    Raises:
        ImageError: it can't be read, needs a `pixel_range`, or is too large to be decoded whole.
        MissingPackageError: it is a TIFF too large to be decoded whole, and tifffile is missing.
    """
    tiff, refused = _is_tiff(path), None
    if tiff and importlib.util.find_spec("tifffile") is not None:
        try:
            return TiffWindows(path)
        except ImageError as error:
            refused = error
    try:
        return _whole_image(path, str(path), pixel_range)
    except PixelRangeError:
        raise
    except ImageError as error:
        if refused is not None:
            raise refused from error
        if tiff:
            needs("tifffile", extra="tiff")
        raise


def _is_tiff(path: Path) -> bool:
    """Whether the first bytes are a TIFF's; suffixes mislead: slides are named .svs, and some JPEGs .tif."""
    try:
        if not path.is_file():  # reading a pipe could block
            return False
        with path.open("rb") as file:
            return file.read(4) in TIFF_STARTS
    except OSError:
        return False
