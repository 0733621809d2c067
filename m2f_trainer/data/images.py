"""Images opened safely: regular files of known formats only, by pixel count, as RGB or refused with advice.

Annotations are in stored pixels, so EXIF orientation is never applied. Alpha is dropped, animations give their first
frame, 16-bit greys are scaled to 8 bits.
"""

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401 (Pillow registers these two on import only)

from m2f_trainer.errors import ImageError
from m2f_trainer.masks.rle import MAX_PIXELS, Size

ImageSource: TypeAlias = Mapping[str, Any] | str | Path | Image.Image | npt.NDArray[Any]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # none starts an external decoder
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")
CUT = "Cut the image into tiles; `m2f predict --tile` does so by itself where it is a TIFF."
_DIRECT = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr")
_DEEP_GREYS = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def open_image(
    source: ImageSource, where: str, *, size: Size | None = None, shrink_to: Size | None = None
) -> Image.Image:
    """The image as 8-bit RGB, decoded.

    Args:
        source: a path, a datasets' `{"path", "bytes"}`, a Pillow image, or an array (H, W) or (H, W, 3) of uint8
        where: names the image in messages
        size: (height, width) that the stored image must have
        shrink_to: (height, width) to keep at least; a JPEG is then decoded at 1/2, 1/4 or 1/8 where that is enough

    Raises:
        ImageError: missing, not a regular file, damaged, too large, of another size, or not convertible to RGB
    """
    image = open_stored(source, where)
    check_pixels(image.size, where)
    if size is not None:
        check_size((image.height, image.width), size, where)
    try:
        if shrink_to is not None:
            image.draft("RGB", shrink_to[::-1])
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(
            f"{where}: the image data is damaged ({error}). Replace the file, or remove it from the set."
        ) from error
    return _to_rgb(image, where)


def image_size(source: Mapping[str, Any] | str | Path, where: str) -> Size:
    """(height, width) of the stored pixels, read from the file's header.

    Raises:
        ImageError: as `open_image`, as far as the header tells
    """
    with _identify(_file_of(source, where), where) as image:
        check_pixels(image.size, where)
        return image.height, image.width


def check_pixels(size: tuple[int, int], where: str) -> None:
    """Refuses decompression bombs by (width, height).

    Raises:
        ImageError: more than `MAX_PIXELS`
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{where}: expected at most {MAX_PIXELS:,} pixels, got {width}x{height}. {CUT}")


def check_size(found: Size, expected: Size, where: str) -> None:
    """Refuses an image whose (height, width) aren't those its annotations were drawn on.

    Raises:
        ImageError: the sizes differ
    """
    if found != expected:
        turned = " It is turned: annotate the image as it is stored, without its EXIF rotation." * (
            found == expected[::-1]
        )
        raise ImageError(
            f"{where}: expected {expected[1]}x{expected[0]} pixels as its annotations say, got {found[1]}x{found[0]}."
            f"{turned or ' Correct `width` and `height`, or put the annotated image back.'}"
        )


def open_stored(source: ImageSource, where: str) -> Image.Image:
    """The image in its stored mode, its header read and its pixels not yet.

    Raises:
        ImageError: missing, not a regular file, or of no known format
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, where)
    file = _file_of(source, where)
    try:  # read whole: Pillow keeps the files of some formats open
        return _identify(io.BytesIO(file.read_bytes()) if isinstance(file, Path) else file, where)
    except OSError as error:
        raise ImageError(f"{where}: the file {file} can't be read ({error}). Check its permissions.") from error


def _file_of(source: Mapping[str, Any] | str | Path, where: str) -> Path | io.BytesIO:
    if not isinstance(source, Mapping):
        return _regular_file(Path(source), where)
    data, path = source.get("bytes"), source.get("path")
    if data is None and path is None:
        raise ImageError(f"{where}: expected an image with 'path' or 'bytes', got neither. Build the dataset again.")
    return io.BytesIO(data) if data is not None else _regular_file(Path(str(path)), where)


def _regular_file(path: Path, where: str) -> Path:
    """Pipes and devices are never opened: reading one may never end."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (half the time of Path.stat, and called for every sample)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"{where}: the file {path} can't be read ({error}). Add it, or remove its annotations."
        ) from error
    if not stat.S_ISREG(mode):
        raise ImageError(f"{where}: {path} is not a regular file (a folder, pipe or device). Put an image there.")
    return path


def _identify(file: Path | io.BytesIO, where: str) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{where}: expected at most {MAX_PIXELS:,} pixels ({error}). {CUT}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(
            f"{where}: not an image of a known format ({', '.join(FORMATS)}): {_looks_like(file)}."
            " Replace the file, or remove it from the set."
        ) from error


def _looks_like(file: Path | io.BytesIO) -> str:
    """What a file that is no image probably is."""
    try:
        head = file.getvalue()[:64] if isinstance(file, io.BytesIO) else _head(file)
    except OSError as error:
        return f"it can't be read ({error})"
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page: the download failed"
    return f"it starts with {head[:8]!r}"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _from_array(array: npt.NDArray[Any], where: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ImageError(
            f"{where}: expected an array (H, W) or (H, W, 3) of uint8, got {array.shape} of {array.dtype}."
            " Scale it to 0..255 and put the colours last."
        )
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _DEEP_GREYS:
        return _from_deep_grey(image, where)
    if image.mode in _DIRECT:
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    raise ImageError(
        f"{where}: an image of mode {image.mode} has no one right conversion to 8-bit RGB."
        " Convert it yourself, scaled as your data means it, and save it as PNG."
    )


def _from_deep_grey(image: Image.Image, where: str) -> Image.Image:
    """16-bit greys scaled to 8 bits; Pillow's own conversion saturates at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ImageError(
            f"{where}: expected greys of 0 to 65535, got {values.min()} to {values.max()}. Scale the image to 16 bits."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
