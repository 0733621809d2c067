"""The files of a dataset folder: list those that aren't hidden, unpack gzipped ones, recognise JSON by its keys."""

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

from m2f_trainer.errors import DataError

_PART = 1 << 22  # bytes that are read at once
_LARGEST_RATIO = 200  # of JSON to its gzip file; annotations have up to 30, a decompression bomb has 1000
_SMALL = 1 << 26  # bytes of JSON that are read whatever the ratio

NO_CATEGORIES = "COCO without categories"
NO_ANNOTATIONS = "COCO images without annotations"
JSON_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("COCO panoptic", ("images", "annotations", "segments_info")),
    ("COCO", ("images", "annotations", "categories")),
    ("labelme", ("shapes", "imagePath")),
    ("VGG Image Annotator project", ("regions", "shape_attributes")),
    ("Supervisely", ("objects", "classTitle")),
    ("Datumaro", ("items", "categories", "infos")),
    ("SA-1B", ("image", "annotations", "segmentation")),
    ("Label Studio JSON", ("annotations", "result", "from_name")),
    ("Labelbox", ("data_row", "projects")),
    ("FiftyOne's own format", ("samples", "_cls")),
    ("COCO captions", ("images", "annotations", "caption")),
    (NO_CATEGORIES, ("images", "annotations")),
    (NO_ANNOTATIONS, ("images", "categories")),
)
"""Kind of a JSON file, and the keys that all occur in it somewhere; the first kind that fits is taken."""


def is_hidden(path: Path) -> bool:
    """Whether it is a dot file (also `._photo.jpg` of macOS) or the folder `__MACOSX`."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def visible(folder: Path) -> list[Path]:
    """The entries of a folder that aren't hidden, by name; none if it isn't a folder that can be read."""
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path))
    except OSError:
        return []


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by name."""
    return [path for path in visible(folder) if path.is_dir()]


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The visible files below a folder with one of these suffixes (in lower case), in the order of their paths."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(Path(name))]
        found += [Path(place, name) for name in files if name.lower().endswith(suffixes)]
    return sorted(path for path in found if not is_hidden(path))


def json_files(folder: Path) -> list[Path]:
    """The visible JSON files in a folder, by name, also gzipped ones."""
    return [path for path in visible(folder) if path.name.lower().endswith((".json", ".json.gz")) and path.is_file()]


def stem(path: Path) -> str:
    """The name of a JSON file without its endings."""
    return re.sub(r"\.json(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def file_parts(path: Path) -> Iterator[bytes]:
    """The content of a file in parts, unpacked where its name ends in .gz.

    Raises:
        OSError: it can't be read, or isn't gzip
        DataError: it unpacks to much more than annotations could (a decompression bomb)
    """
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            while part := file.read(_PART):
                yield part
        return
    limit, found = max(_SMALL, _LARGEST_RATIO * path.stat().st_size), 0
    try:
        with gzip.open(path) as file:
            while part := file.read(_PART):
                found += len(part)
                if found > limit:
                    raise DataError(f"{path}: unpacks to more than {limit:,} bytes. Unpack it yourself and check it.")
                yield part
    except (EOFError, zlib.error) as error:
        raise OSError(f"not a whole gzip file: {error}") from error


def file_state(path: str | Path) -> tuple[int, int] | None:
    """Size and modification time of a file; None for one that doesn't exist."""
    try:
        state = os.stat(path)  # noqa: PTH116 (called for every image)
    except (OSError, ValueError):
        return None
    return state.st_size, state.st_mtime_ns


def kind_of_json(path: Path) -> str:
    """The kind of a JSON file by the keys that occur in it, "" if it is none of `JSON_KINDS` or can't be read."""
    try:
        return _kind_of_json(path, file_state(path))
    except (OSError, DataError):
        return ""


@lru_cache(maxsize=1 << 16)
def _kind_of_json(path: Path, state: tuple[int, int] | None) -> str:
    """The same, cached for a file of this size and time of modification."""
    missing = {key.encode() for _, keys in JSON_KINDS for key in keys}
    found: set[str] = set()
    tail = b""
    for part in file_parts(path):
        text, place = tail + part, 0
        while match := _one_of(frozenset(missing)).search(text, place):
            missing.remove(match[1])
            found.add(match[1].decode())
            place = match.end()
        tail = text[-100:]
    return next((kind for kind, keys in JSON_KINDS if found.issuperset(keys)), "")


@cache
def _one_of(keys: frozenset[bytes]) -> re.Pattern[bytes]:
    """A pattern of one of these keys; no key at all matches nothing."""
    return re.compile(rb'"(%s)"\s*:' % b"|".join(sorted(keys)) if keys else rb"(?!)")
