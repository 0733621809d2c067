"""Open images safely, as 8-bit RGB: only regular files, of known formats, up to a limit of pixels.

Annotations refer to the stored pixels, or to the image as viewers show it, turned by its EXIF orientation. The
annotated size decides which, unless both have the same size; then the stored pixels are used. Photos without
annotations are read as viewers show them. Alpha is dropped, only the first frame of an animation is read, and 16-bit
greys are scaled to 8 bits. Images without an unambiguous conversion to RGB are rejected, with the fix.
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

from m2f_trainer.errors import ImageError, ImageSizeError, MissingImageError
from m2f_trainer.masks.rle import MAX_PIXELS, Size

ImageSource: TypeAlias = Mapping[str, Any] | str | Path | Image.Image | npt.NDArray[Any]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # Pillow runs no external program for these
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")
_CUT = "Cut the image into tiles; `m2f predict --tile` does so itself for a TIFF."
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation; Pillow turns TIFF files itself
_MODES_TO_RGB = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr")
_MODES_OF_16_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def open_image(
    source: ImageSource,
    where: str,
    *,
    size: Size | None = None,
    shrink_to: Size | None = None,
    displayed: bool = False,
) -> Image.Image:
    """The image as 8-bit RGB, decoded.

    Args:
        source: a path, a datasets' `{"path", "bytes"}`, a Pillow image, or an array (H, W) or (H, W, 3) of uint8
        where: the image's name in messages
        size: the size that the image must have, as it is stored or as viewers show it; it is returned in that frame
        shrink_to: the smallest size that suffices; a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is not
            smaller
        displayed: whether a file is returned as viewers show it, turned by its EXIF orientation

    Raises:
        MissingImageError: the file does not exist
        ImageSizeError: the image has another size than `size`
        ImageError: it is not a regular file, damaged, too large, or not convertible to RGB
    """
    image = open_stored(source, where)
    check_pixels(image.size, where)
    turned = displayed and not isinstance(source, Image.Image)
    if size is not None:
        turned = is_turned(image, size)
        check_annotated_size((image.height, image.width), size[::-1] if turned else size, where)
    orientation = exif_orientation(image) if turned else 1
    try:
        if shrink_to is not None:
            image.draft("RGB", shrink_to if orientation > 4 else shrink_to[::-1])
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(
            f"{where}: the image data is damaged ({error}). Replace the file, or remove it from the set."
        ) from error
    rgb = _to_rgb(image, where)
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def is_turned(image: Image.Image, size: Size) -> bool:
    """Whether `size` is that of the image as viewers show it and not that of its stored pixels."""
    stored = (image.height, image.width)
    return stored != size and stored == size[::-1] and exif_orientation(image) > 4


def image_size(source: Mapping[str, Any] | str | Path, where: str) -> Size:
    """The size of the stored image, read from the header of the file.

    Raises:
        MissingImageError: the file does not exist
        ImageError: it is not a regular file of a known format, or too large
    """
    with _identify(_file_of(source, where), where) as image:
        check_pixels(image.size, where)
        return image.height, image.width


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 where there is none; 5 to 8 show it with width and height swapped."""
    if image.format == "TIFF":
        return 1  # Pillow turns it
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (ValueError, TypeError, OSError, SyntaxError, KeyError):
        return 1  # viewers ignore damaged EXIF data


def check_pixels(size: tuple[int, int], where: str) -> None:
    """Reject decompression bombs; `size` is Pillow's (width, height).

    Raises:
        ImageError: more than `MAX_PIXELS`
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{where}: expected at most {MAX_PIXELS:,} pixels, got {width}x{height}. {_CUT}")


def check_annotated_size(found: Size, expected: Size, where: str) -> None:
    """Reject an image that has another size than its annotations say.

    Raises:
        ImageSizeError: the sizes differ
    """
    if found == expected:
        return
    fix = "Correct `width` and `height`, or restore the annotated image."
    if found == expected[::-1]:
        fix = "Width and height are swapped, and no EXIF rotation of the image explains it. Correct them."
    raise ImageSizeError(
        f"{where}: expected {expected[1]}x{expected[0]} pixels as its annotations say, got {found[1]}x{found[0]}. {fix}"
    )


def open_stored(source: ImageSource, where: str) -> Image.Image:
    """The image in its stored mode: the header is read, the pixels are not decoded yet.

    Raises:
        MissingImageError: the file does not exist
        ImageError: it is not a regular file of a known format
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, where)
    file = _file_of(source, where)
    try:  # the file is read at once: Pillow keeps files of some formats open
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
    """The path of a regular file; pipes and devices are never opened, because reading one may never end."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (half the time of Path.stat, and called for every sample)
    except (OSError, ValueError) as error:
        kind = MissingImageError if isinstance(error, FileNotFoundError) else ImageError
        raise kind(
            f"{where}: the file {path} can't be read ({error}). Add the file, or remove the image and its annotations."
        ) from error
    if not stat.S_ISREG(mode):
        raise ImageError(f"{where}: {path} is not a regular file (a folder, pipe or device). Put an image there.")
    return path


def _identify(file: Path | io.BytesIO, where: str) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{where}: expected at most {MAX_PIXELS:,} pixels ({error}). {_CUT}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(
            f"{where}: not an image of a known format ({', '.join(FORMATS)}): {_guess_content(file)}."
            " Replace the file, or remove it from the set."
        ) from error


def _guess_content(file: Path | io.BytesIO) -> str:
    """A description of a file that isn't an image, from its first bytes."""
    try:
        with file.open("rb") if isinstance(file, Path) else io.BytesIO(file.getvalue()) as opened:
            head = opened.read(64)
    except OSError as error:
        return f"it can't be read ({error})"
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page: the download failed"
    return f"it starts with {head[:8]!r}"


def _from_array(array: npt.NDArray[Any], where: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ImageError(
            f"{where}: expected an array (H, W) or (H, W, 3) of uint8, got {array.shape} of {array.dtype}."
            " Scale it to 0..255 and make colour the last axis."
        )
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _MODES_OF_16_BITS:
        return _from_16_bits(image, where)
    if image.mode in _MODES_TO_RGB:
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    raise ImageError(
        f"{where}: expected an image with an unambiguous conversion to 8-bit RGB, got mode {image.mode}."
        " Convert it with the scale that fits your data, and save it as PNG."
    )


def _from_16_bits(image: Image.Image, where: str) -> Image.Image:
    """16-bit greys scaled to 8 bits; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ImageError(
            f"{where}: expected greys of 0 to 65535, got {values.min()} to {values.max()}. Scale the image to 16 bits."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
