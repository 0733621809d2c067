"""How the images of a dataset are read: the frame of their annotations, and the range of pixel values.

Both are stored in each row, so that training, evaluation and pictures read an image the same way.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from m2f_trainer.config.arguments import ExifFrame, PixelRange
from m2f_trainer.data.images import ImageHeader, image_header, range_of, sampled_values
from m2f_trainer.data.problems import Report
from m2f_trainer.errors import DataError
from m2f_trainer.masks.rle import Size

Source: TypeAlias = Callable[[], Mapping[str, Any]]
"""Reads the data of an image as `datasets.Image` stores it."""

_THREADS = 8  # files are read without Python's global lock
_IMAGES = 200  # whose values are sampled
_VALUES = 4096  # of each


@dataclass(frozen=True)
class Reading:
    """How the images of a dataset are read.

    Attributes:
        displayed: whether annotations lie on images as viewers show them; used only where the sizes don't decide
        pixel_range: for images of more than 8 bits, see `images.open_image`; None where there are none
    """

    displayed: bool = False
    pixel_range: PixelRange = None

    def columns(self) -> dict[str, Any]:
        """The values of a row. Percentiles of each image are an empty list."""
        stored: list[float] | None = None
        if self.pixel_range is not None:
            stored = [] if self.pixel_range == "image" else list(self.pixel_range)
        return {"displayed": self.displayed, "pixel_range": stored}


def reading_of(row: Mapping[str, Any]) -> Reading:
    """How the image of a row is read, the inverse of `Reading.columns`; the default for rows of earlier versions."""
    stored = row.get("pixel_range")
    displayed = bool(row.get("displayed"))
    if stored is None:
        return Reading(displayed)
    return Reading(displayed, (stored[0], stored[1])) if len(stored) else Reading(displayed, "image")


def model_range(stored: Sequence[float] | str | None) -> PixelRange:
    """The range of values in the configuration of a model."""
    if stored is None or isinstance(stored, str):
        return "image" if stored == "image" else None
    return float(stored[0]), float(stored[1])


@dataclass(frozen=True)
class Photo:
    """One image file: its split for messages, id, data, annotated size, and whether it has annotations."""

    split: str
    image_id: int
    file_name: str
    source: Source
    size: Size
    annotated: bool

    @property
    def where(self) -> str:
        return f"image {self.image_id} ({self.file_name})"


def find_reading(
    photos: Sequence[Photo],
    exif_frame: ExifFrame,
    pixel_range: PixelRange | Literal["auto"],
    report: Report,
) -> Reading:
    """How the images of a dataset are read; `photos` are those of all splits, the training split first.

    Reports photos whose frame is not known.
    """
    if exif_frame != "auto" and pixel_range != "auto":
        return Reading(exif_frame == "displayed", pixel_range)
    headers = list(_headers(photos))
    displayed = exif_frame == "displayed"
    if exif_frame == "auto":
        displayed = _find_frame(headers, report)
    if pixel_range == "auto":
        first = photos[0].split if photos else ""
        deep = [photo.source for photo, header in headers if header.deep]
        of_first = [photo.source for photo, header in headers if header.deep and photo.split == first]
        pixel_range = common_range(of_first or deep)
    return Reading(displayed, pixel_range)


def common_range(sources: Sequence[Source]) -> PixelRange:
    """The range of values of images of more than 8 bits, from a sample of them; None where there are no two values."""
    values: list[npt.NDArray[Any]] = []
    for number in spaced(len(sources), _IMAGES):
        try:
            values.append(sampled_values(sources[number](), "image", _VALUES))
        except DataError:
            continue  # reported when the images are checked
    every = np.concatenate(values) if values else np.zeros(0)
    return range_of(every) if len(np.unique(every)) > 1 else None


def spaced(length: int, count: int) -> list[int]:
    """At most `count` evenly spaced indices of a sequence, without repetition."""
    return sorted({int(place) for place in np.linspace(0, length - 1, count)}) if length else []


def size_in_frame(
    source: Mapping[str, Any] | str | Path, where: str, exif_frame: ExifFrame, name: str, report: Report
) -> Size:
    """The size of an image whose annotations have none, read from the file in the frame of the annotations.

    Reports an image whose stored and displayed sizes differ if `exif_frame` is auto.

    Raises:
        ImageError: it can't be read
    """
    header = image_header(source, where)
    if header.orientation <= 4:
        return header.size
    if exif_frame == "auto":
        report("exif-frame", name, [where], f"{where}: {ASK_FRAME}")
    return header.size[::-1] if exif_frame == "displayed" else header.size


ASK_FRAME = (
    "viewers turn this photo by its EXIF orientation, and its annotations don't say whether they lie on the photo as"
    " viewers show it. Give --exif_frame displayed if it was annotated in a tool that shows it upright, as most do, or"
    " --exif_frame stored if the masks fit the stored pixels."
)


def _headers(photos: Iterable[Photo]) -> Iterator[tuple[Photo, ImageHeader]]:
    """Photos with the headers of their files; those that can't be read are left out."""

    def read(photo: Photo) -> ImageHeader | None:
        try:
            return image_header(photo.source(), photo.where)
        except DataError:
            return None  # reported when the images are checked

    with ThreadPoolExecutor(_THREADS) as pool:
        for photo, header in zip(photos, pool.map(read, photos), strict=True):
            if header is not None:
                yield photo, header


def _find_frame(headers: Sequence[tuple[Photo, ImageHeader]], report: Report) -> bool:
    """Whether annotations lie on photos as viewers show them, decided by photos whose two sizes differ.

    Reports annotated photos that fit both frames if no other photo decides, or if others contradict each other.
    """
    turned = [(photo, header) for photo, header in headers if header.orientation > 1 and photo.annotated]
    decisive = [
        (photo.size == header.size[::-1])
        for photo, header in turned
        if header.orientation > 4 and header.size[0] != header.size[1]
    ]
    unclear = [photo for photo, header in turned if header.orientation <= 4 or header.size[0] == header.size[1]]
    if not unclear or len(set(decisive)) == 1:
        return any(decisive)
    for name in dict.fromkeys(photo.split for photo in unclear):
        of_split = [photo for photo in unclear if photo.split == name]
        message = f"{name}: {of_split[0].where}: {ASK_FRAME}"
        report("exif-frame", name, [photo.image_id for photo in of_split], message)
    return False
