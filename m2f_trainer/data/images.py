"""Open images safely, as 8-bit RGB: only regular files, of known formats, up to a limit of pixels.

Annotations refer either to the stored pixels or to the image as viewers show it, turned by its EXIF orientation. The
annotated size decides which, unless both have the same size. Photos without annotations are read as viewers show them.
Alpha is dropped; only the first frame of an animation is read. Values of more than 8 bits, grey or colour, are scaled
to 8 bits from a range of values. Images whose conversion to RGB is ambiguous are rejected, with the fix.
"""

import importlib.util
import io
import logging
import os
import stat
import struct
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, TiffImagePlugin

from m2f_trainer.config.arguments import PixelRange
from m2f_trainer.errors import ImageError, ImageSizeError, MissingImageError, PixelRangeError
from m2f_trainer.masks.rle import MAX_PIXELS, Size, max_pixels

ImageSource: TypeAlias = Mapping[str, Any] | str | Path | bytes | Image.Image | npt.NDArray[Any]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "DIB", "QOI", "SGI", "PCX",
           "DCX", "PSD", "ICO", "CUR", "ICNS", "DDS", "BLP", "XBM", "XPM", "MSP", "SUN", "FITS", "FLI", "FTEX",
           "GBR", "PIXAR")  # fmt: skip
"""Pillow's formats that need no external program."""

_BY_SUFFIX = {".tga": "TGA", ".icb": "TGA", ".vda": "TGA", ".vst": "TGA", ".spider": "SPIDER", ".spi": "SPIDER"}
"""Formats without a signature, which can be recognised only by the suffix."""

HEIF = importlib.util.find_spec("pillow_heif") is not None
"""Whether HEIC photos can be opened: the extra `heic` is installed."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jpe", ".jfif", ".avif",
            ".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".mpo", ".apng", ".pbm", ".pnm", ".pfm", ".dib",
            ".qoi", ".sgi", ".rgb", ".rgba", ".bw", ".pcx", ".dcx", ".psd", ".ico", ".cur", ".icns", ".dds", ".blp",
            ".xbm", ".xpm", ".msp", ".ras", ".fits", ".fit", ".fli", ".flc", ".ftc", ".ftu", ".gbr", ".pxr",
            *_BY_SUFFIX, *((".heic", ".heif", ".hif") if HEIF else ()))  # fmt: skip
"""The endings of image files, in lower case."""

HEIC_ADVICE = "pip install 'm2f-trainer[heic]' to read HEIC photos, or save them as JPEG"

_CUT = (
    "Cut the image into tiles, or raise the limit with --max_pixels if you trust the file; `m2f predict --tile` reads"
    " large images by itself."
)
_opening = threading.Lock()  # while Pillow's own limit is lifted
_ORIENTATION = 0x0112  # the EXIF tag
_METADATA = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # of a PNG, where Pillow finds it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""From the stored image to the displayed one, by EXIF orientation."""

_BACK = {**_TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""The inverses of `_TURNS`."""

_MODES_TO_RGB = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr")
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT = 258, 277, 339  # TIFF tags
_SAMPLES = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers"}
"""The kinds of values of a TIFF file, by its sample format."""

_WIDE = (";16B", ";16L", ";16N")  # how Pillow names 16-bit values in a file
_GREY_WITH_ALPHA = "LA;16B"
_CHANNELS = (
    "expected one image of one channel, or of three or four (RGB, alpha is dropped), got {}. Save one"
    " of them as a grey image, or the three that show the objects best as an RGB image."
)
SEVERAL_PAGES = _CHANNELS.format("several pages of one size, such as the channels or slices of a stack")
"""Why a TIFF file with several pages is refused: only the first would be read."""

_OUTSIDE = 0.001  # the fraction of an image's pixels below its range, and the fraction above it

logger = logging.getLogger(__name__)
_warned: list[str] = []  # an image with few grey levels
_SAMPLED = 10_000  # values of an image that are looked at first, whether few grey levels are left

FEWEST_LEVELS = 64
"""Grey levels after conversion to 8 bits, below which another range of values is proposed."""

FULL_RANGE = (0, 65535)
"""The range of values of an image of more than 8 bits where none is given."""


def open_image(
    source: ImageSource,
    where: str,
    *,
    size: Size | None = None,
    shrink_to: Size | None = None,
    displayed: bool = False,
    pixel_range: PixelRange = None,
    limit: int | None = None,
) -> Image.Image:
    """The image as 8-bit RGB, decoded.

    Args:
        source: a path, the bytes of a file, a datasets' `{"path", "bytes"}`, a Pillow image, or an array (H, W) or
            (H, W, C) of 1, 3 or 4 channels; its values are 0 to 255 if it is uint8, or of whole numbers of another
            type than uint16 without one above 255, and of more bits otherwise
        where: the image's name in messages
        size: the size that the image must have, as it is stored or as viewers show it; it is returned in that frame
        shrink_to: the smallest size that is enough; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size where that
            is not smaller
        displayed: whether a file is returned as viewers show it, turned by its EXIF orientation; used only where
            `size` doesn't decide
        pixel_range: for images of more than 8 bits, the values that become 0 and 255, or "image" for percentiles of
            the image itself; by default `FULL_RANGE`
        limit: the most pixels that it may have; by default `max_pixels`

    Raises:
        MissingImageError: the file does not exist
        ImageSizeError: the image has another size than `size`
        PixelRangeError: its values can't be scaled to 8 bits without a `pixel_range`
        ImageError: it is not a regular file, damaged, too large, or not convertible to RGB
    """
    if isinstance(source, np.ndarray) and source.dtype != np.uint8:
        return _from_deep_array(source, where, pixel_range)
    image = open_stored(source, where, limit)
    check_pixels(image.size, where, limit)
    turned = displayed and not isinstance(source, Image.Image)
    orientation, by_pillow = exif_orientation(image), isinstance(image, TiffImagePlugin.TiffImageFile)
    if size is not None:
        turned = is_turned(image, size, displayed)
        check_annotated_size(stored_size(image), size[::-1] if turned and orientation > 4 else size, where)
    elif by_pillow and isinstance(source, Image.Image):
        turned = True  # as Pillow decodes it
    try:
        low_bytes = _low_bytes(image)
        if shrink_to is not None:
            image.draft("RGB", shrink_to if turned and orientation > 4 else shrink_to[::-1])
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(
            f"{where}: the image data is damaged ({error}). Replace the file, or remove it from the set."
        ) from error
    rgb = _to_rgb(image, low_bytes, where, pixel_range)
    if by_pillow:  # it turns TIFF files itself when it decodes them
        return rgb if turned or orientation == 1 else rgb.transpose(_BACK[orientation])
    return rgb.transpose(_TURNS[orientation]) if turned and orientation != 1 else rgb


def stored_size(image: Image.Image) -> Size:
    """The size of an image as it is stored, before its pixels are decoded."""
    size = image.height, image.width
    swapped = isinstance(image, TiffImagePlugin.TiffImageFile) and exif_orientation(image) > 4  # by Pillow
    return size[::-1] if swapped else size


def is_turned(image: Image.Image, size: Size, displayed: bool = False) -> bool:
    """Whether annotations of this size are drawn on the image as viewers show it and not on its stored pixels.

    `displayed` decides where both have the same size.
    """
    stored, orientation = stored_size(image), exif_orientation(image)
    if stored != size:
        return stored == size[::-1] and orientation > 4
    return displayed and (orientation in (2, 3, 4) or (orientation > 4 and image.width == image.height))


@dataclass(frozen=True)
class ImageHeader:
    """Header of an image file: size as stored, EXIF orientation, whether values have more than 8 bits."""

    size: Size
    orientation: int
    deep: bool


def image_header(source: Mapping[str, Any] | str | Path, where: str) -> ImageHeader:
    """Read the header of an image file.

    Raises:
        MissingImageError: the file does not exist
        ImageError: it is not a regular file of a known format, or too large
    """
    with _identify(_file_of(source, where), where) as image:
        check_pixels(image.size, where)
        return ImageHeader(stored_size(image), exif_orientation(image), is_deep(image))


def image_size(source: Mapping[str, Any] | str | Path, where: str) -> Size:
    """The size of the stored image, read from the header of the file. Raises as `image_header`."""
    return image_header(source, where).size


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image whose pixels are not decoded yet, 1 where there is none; 5 to 8 show it with
    width and height swapped.
    """
    if image.format == "PNG" and _METADATA.isdisjoint(image.info):
        return 1  # Image.getexif would decode the whole image to look for more
    try:
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else image.getexif()
        found = int(tags.get(_ORIENTATION, 1))
    except (ValueError, TypeError, OSError, SyntaxError, KeyError):
        return 1  # viewers ignore damaged EXIF data
    return found if found in _TURNS else 1


def check_pixels(size: tuple[int, int], where: str, limit: int | None = None) -> None:
    """Reject decompression bombs; `size` is Pillow's (width, height).

    Raises:
        ImageError: more than `limit`, by default `max_pixels`
    """
    width, height = size
    if width * height > (limit or max_pixels()):
        raise ImageError(
            f"{where}: expected at most {limit or max_pixels():,} pixels, got {width}x{height} = {width * height:,}."
            f" {_CUT}"
        )


def check_annotated_size(found: Size, expected: Size, where: str) -> None:
    """Reject an image that has another size than its annotations say.

    Raises:
        ImageSizeError: the sizes differ
    """
    if found == expected:
        return
    fix = "Correct `width` and `height`, or restore the annotated image."
    scales = [one / other for one, other in zip(found, expected, strict=True)]
    if max(scales) < 1.02 * min(scales) and abs(scales[0] - 1) > 0.05:
        fix = (
            f"It seems to have been resized after it was annotated, to {scales[0]:.3g} times its size. Use the"
            " annotated image, or multiply `width`, `height` and all coordinates by that factor."
        )
    if found == expected[::-1]:
        fix = "Width and height are swapped, and no EXIF rotation of the image explains it. Correct them."
    raise ImageSizeError(
        f"{where}: expected {expected[1]}x{expected[0]} pixels as its annotations say, got {found[1]}x{found[0]}. {fix}"
    )


def open_stored(source: ImageSource, where: str, limit: int | None = None) -> Image.Image:
    """The image in its stored mode: the header is read, the pixels are not decoded yet.

    `limit` is as of `open_image`; it is for the caller to check.

    Raises:
        MissingImageError: the file does not exist
        ImageError: it is not a regular file of a known format
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(_checked_array(source, where))
    file = _file_of(source, where)
    try:  # the file is read at once: Pillow keeps files of some formats open
        return _identify(file, where, whole=True, limit=limit)
    except OSError as error:
        raise ImageError(f"{where}: the file {file} can't be read ({error}). Check its permissions.") from error


def _file_of(source: Mapping[str, Any] | str | Path | bytes, where: str) -> Path | io.BytesIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
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


@cache
def _installed_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this version of Pillow has, and HEIF if pillow-heif is installed."""
    Image.init()
    if HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()  # turns photos as viewers show them, and removes the EXIF orientation
    return tuple(name for name in (*FORMATS, "HEIF") if name in Image.OPEN)


def _open_file(file: Path | io.BytesIO, formats: tuple[str, ...], limit: int) -> Image.Image:
    """Image.open, without Pillow's own limit of pixels where `limit` is higher."""
    if limit <= MAX_PIXELS:
        return Image.open(file, formats=formats)
    with _opening:
        usual = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def _identify(file: Path | io.BytesIO, where: str, whole: bool = False, limit: int | None = None) -> Image.Image:
    """The image of a file; `whole`: the file is read at once."""
    by_suffix = _BY_SUFFIX.get(file.suffix.lower()) if isinstance(file, Path) else None
    if whole and isinstance(file, Path):
        file = io.BytesIO(file.read_bytes())
    try:
        formats = (*_installed_formats(), *([by_suffix] if by_suffix else []))
        image = _open_file(file, formats, limit or max_pixels())
        if isinstance(image, TiffImagePlugin.TiffImageFile) and (problem := _problem_of_tiff(image)):
            image.close()
            raise ImageError(f"{where}: {problem}")
        return image
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{where}: expected at most {limit or max_pixels():,} pixels ({error}). {_CUT}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if problem := _problem_of_unknown_tiff(file):
            raise ImageError(f"{where}: {problem}") from error
        raise ImageError(
            f"{where}: not an image of a known format: {_guess_content(file)}."
            " Replace the file, or remove it from the set."
        ) from error


def _problem_of_tiff(image: TiffImagePlugin.TiffImageFile) -> str:
    """Why Pillow would read only the first channel of a TIFF file, or half of each value; "" if it reads all."""
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))
    most = max(bits if isinstance(bits, tuple) else (bits,))
    if most > 8 and image.mode in ("RGB", "RGBA", "CMYK", "LA") and not _raw_mode(image).endswith(_WIDE):
        return (
            f"{image.mode} channels of {most} bits are stored one after the other, which is not read. Save the file"
            " with interleaved channels, or as PNG."
        )
    samples = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1)
    if samples > 4 or (samples > 1 and image.mode in ("L", "P")):  # Pillow would drop those after the third or first
        return too_many_channels(samples)
    size = image.size
    if image.is_animated:  # it has several pages
        image.seek(1)
        same = image.size == size
        image.seek(0)
        if same:
            return SEVERAL_PAGES
    return ""


def too_many_channels(count: int) -> str:
    """The message about an image of more than four channels."""
    return _CHANNELS.format(f"{count} channels")


def _problem_of_unknown_tiff(file: Path | io.BytesIO) -> str:
    """Why Pillow doesn't read a TIFF file: its number of channels, or their type; "" for other files."""
    try:
        with file.open("rb") if isinstance(file, Path) else io.BytesIO(file.getvalue()) as opened:
            directory = TiffImagePlugin.ImageFileDirectory_v2(opened.read(8))
            opened.seek(directory.next)
            directory.load(opened)
        samples, bits = int(directory.get(_SAMPLES_PER_PIXEL, 1)), max(directory.get(_BITS_PER_SAMPLE, (1,)))
        kind = _SAMPLES.get(max(directory.get(_SAMPLE_FORMAT, (1,))), "values of another kind")
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, EOFError, struct.error):
        return ""
    if samples > 4:
        return too_many_channels(samples)
    if bits <= 16 and samples != 2 and kind != _SAMPLES[3]:
        return ""  # of a known type: it is damaged
    return (
        "expected a TIFF file of one channel of 8- to 32-bit integers or 32-bit floating-point numbers, or of RGB in 8"
        f" or 16 bits, got {samples} channel{'s' * (samples > 1)} of {bits}-bit {kind}. Save it as one of these."
    )


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
    if head[4:8] == b"ftyp":
        return "it may be HEIC, which is not read" if HEIF else f"it may be HEIC: {HEIC_ADVICE}"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "it is EPS, which is not read: save it as PNG"
    if b"<svg" in head or head.startswith(b"<?xml"):
        return "it may be SVG, which is not read: save it as PNG"
    return f"it starts with {head[:8]!r}"


def _checked_array(array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """The array as (H, W) or (H, W, 3); a single channel and alpha are dropped."""
    if array.ndim == 3 and array.shape[2] == 1:
        return array[..., 0]
    if array.ndim == 3 and array.shape[2] == 4:
        return np.ascontiguousarray(array[..., :3])
    if array.ndim in (2, 3) and array.shape[2:] in ((), (3,)) and array.size:
        return np.ascontiguousarray(array)
    if array.ndim == 3 and array.shape[2] > 4 and array.shape[0] > 4:
        raise ImageError(f"{where}: {too_many_channels(array.shape[2])}")
    raise ImageError(
        f"{where}: expected an array (H, W) or (H, W, 3), got {array.shape} of {array.dtype}. Make colour the last"
        " axis."
    )


def _from_deep_array(array: npt.NDArray[Any], where: str, pixel_range: PixelRange) -> Image.Image:
    kind = array.dtype.kind
    if kind not in "uif" or (kind == "f" and pixel_range is None):
        raise ImageError(
            f"{where}: expected an array (H, W) or (H, W, 3) of uint8, got {array.shape} of {array.dtype}."
            " Scale it to 0..255 and convert it, or give the values of black and white as pixel_range."
        )
    checked = _checked_array(array, where)
    if pixel_range is None and array.dtype != np.uint16 and checked.min() >= 0 and checked.max() <= 255:
        return Image.fromarray(checked.astype(np.uint8)).convert("RGB")
    return Image.fromarray(scaled(checked, where, pixel_range)).convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether the values of an image have more than 8 bits; its pixels need not be decoded yet."""
    return image.mode in _DEEP_MODES or _raw_mode(image).endswith(_WIDE)


def _raw_mode(image: Image.Image) -> str:
    """How the pixels of a file are stored, as Pillow's decoders name it; "" for an image that is decoded."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    found = tiles[0].args
    return str(found[0] if isinstance(found, tuple) else found)


def _low_bytes(image: Image.Image) -> npt.NDArray[np.int64] | None:
    """The low bytes (H, W, C) of an image of 16-bit colours, of which Pillow decodes the high bytes only; else None.

    The file is decoded a second time in the other byte order. Of grey with alpha, for which Pillow has no other order
    and which it decodes as RGBA, all bytes are decoded as if they were RGBA, and those of grey are returned (H, W, 1).
    """
    mode = _raw_mode(image)
    if not (isinstance(image, ImageFile.ImageFile) and mode.endswith(_WIDE) and mode[:2] != "I;"):
        return None
    if not isinstance(image.fp, io.BytesIO) or image.tell():
        return None
    native = "L" if sys.byteorder == "little" else "B"
    order = mode[-1] if mode[-1] != "N" else native
    wanted = "RGBA" if mode == _GREY_WITH_ALPHA else mode[:-1] + ("B" if order == "L" else "L")
    with Image.open(io.BytesIO(image.fp.getvalue()), formats=[str(image.format)]) as other:
        other.tile = [
            tile._replace(args=(wanted, *tile.args[1:]) if isinstance(tile.args, tuple) else wanted)
            for tile in other.tile
        ]
        values = np.asarray(other).astype(np.int64)
    return values[..., 1:2] if mode == _GREY_WITH_ALPHA else values  # its bytes: high and low of grey, then of alpha


def _to_rgb(
    image: Image.Image, low_bytes: npt.NDArray[np.int64] | None, where: str, pixel_range: PixelRange
) -> Image.Image:
    if low_bytes is not None:
        values = (np.asarray(image).astype(np.int64) << 8) | low_bytes
        return Image.fromarray(scaled(values[..., :3], where, pixel_range))
    if image.mode == "RGB":
        return image
    if image.mode in _DEEP_MODES and not (image.mode == "F" and pixel_range is None):
        return Image.fromarray(scaled(np.asarray(image), where, pixel_range)).convert("RGB")
    if image.mode in _MODES_TO_RGB:
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    problem = f"{where}: expected an image with an unambiguous conversion to 8-bit RGB, got mode {image.mode}."
    if image.mode == "F":
        raise PixelRangeError(f"{problem} Give the values of black and white as pixel_range, such as 0,1.")
    raise ImageError(f"{problem} Convert it with the scale that fits your data, and save it as PNG.")


def scaled(values: npt.NDArray[Any], where: str, pixel_range: PixelRange) -> npt.NDArray[np.uint8]:
    """Values of any range scaled to 0 to 255; by default those of `FULL_RANGE`."""
    if pixel_range is None:
        if values.min(initial=0) < FULL_RANGE[0] or values.max(initial=0) > FULL_RANGE[1]:
            raise PixelRangeError(
                f"{where}: expected values of 0 to 65535, got {values.min()} to {values.max()}. Give the values of"
                " black and white as pixel_range."
            )
        grey = ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    else:
        low, high = range_of(values) if pixel_range == "image" else pixel_range
        steps = (np.nan_to_num(values.astype(np.float64), nan=low) - low) * (255 / max(high - low, 1e-30))
        grey = np.rint(np.clip(steps, 0, 255)).astype(np.uint8)
    if pixel_range != "image" and not _warned:
        _warn_of_few_levels(values, grey, where, pixel_range or FULL_RANGE)
    return grey


def _warn_of_few_levels(
    values: npt.NDArray[Any], grey: npt.NDArray[np.uint8], where: str, pixel_range: tuple[float, float]
) -> None:
    """Log the first image of this process that has many different values, of which its range leaves few grey levels.

    Of the data workers of a training, only the first one logs.
    """
    places = np.random.default_rng(0).integers(max(values.size, 1), size=min(values.size, _SAMPLED))
    if len(np.unique(grey.flat[places])) >= FEWEST_LEVELS or len(np.unique(values.flat[places])) < FEWEST_LEVELS:
        return  # enough levels, or few values, such as of a mask or a blank image
    levels = np.count_nonzero(np.bincount(grey.reshape(-1)))
    if levels >= FEWEST_LEVELS:
        return
    _warned.append(where)
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    if worker is None or worker.id == 0:
        own = range_of(values)
        logger.warning(
            "%s: its values lie between %g and %g, of which the range from %g to %g leaves %d of 256 grey levels. Give"
            " the values of black and white as pixel_range, such as %g,%g, or image to scale each image by itself.",
            where,
            *own,
            *pixel_range,
            levels,
            *own,
        )


def range_of(values: npt.NDArray[Any]) -> tuple[float, float]:
    """The range of values that all but one in a thousand lie above, and all but one in a thousand below.

    Whole numbers for whole values.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    whole = np.issubdtype(values.dtype, np.integer)
    quantiles = np.quantile(finite, (_OUTSIDE, 1 - _OUTSIDE), method="nearest" if whole else "linear")
    low, high = map(float, quantiles)
    return (low, high) if high > low else (low, low + 1)


def sampled_values(source: Mapping[str, Any], where: str, count: int) -> npt.NDArray[Any]:
    """About `count` evenly spaced values of an image of more than 8 bits, in its own units. Raises ImageError."""
    image = open_stored(source, where)
    check_pixels(image.size, where)
    try:
        low_bytes = _low_bytes(image)
        values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{where}: the image data is damaged ({error}). Replace the file.") from error
    if low_bytes is not None:
        values = ((values.astype(np.int64) << 8) | low_bytes)[..., :3]
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // count)]
