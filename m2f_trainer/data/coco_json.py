"""Read one COCO annotation file and check every id, reference and number before anything is built from it.

Every problem is passed to a `Report`. Unless the report raises, the faulty part is left out and reading continues.
"""

import gc
import json
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

from m2f_trainer.data.files import file_parts
from m2f_trainer.data.layouts import SplitFiles
from m2f_trainer.data.problems import Report, listed, raise_problem
from m2f_trainer.errors import DataError, MaskError
from m2f_trainer.masks import rle
from m2f_trainer.masks import segmentation as masks

Entry: TypeAlias = dict[str, Any]
"""A JSON object of an annotation file, or a value of a dataset row."""

_LARGEST_ID = 2**63 - 1
_NUMBERS = {int, float}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, left where a tool cut a name: it can't be written again


@dataclass(frozen=True)
class SplitAnnotations(ABC):
    """The checked annotations of one split: ids are unique integers, every annotation has an image and a category.

    Attributes:
        name: the split in messages and findings: its annotation file, its folder of labels, or the Hub dataset
        images: COCO image entries, in the file's order
        annotations: COCO annotation entries by image id
        categories: names by category id, whether used or not
    """

    name: str
    images: tuple[Entry, ...]
    annotations: Mapping[int, list[Entry]]
    categories: Mapping[int, str]

    @abstractmethod
    def source(self, image: Entry) -> Entry:
        """The image's data as `datasets.Image` stores it: `{"path", "bytes"}`.

        Raises:
            DataError: the file name leads out of the dataset folder
        """

    def used_categories(self) -> set[int]:
        """The ids of the categories with at least one annotation."""
        return {entry["category_id"] for group in self.annotations.values() for entry in group}

    def rows(self, report: Report = raise_problem) -> Iterator[Entry]:
        """The dataset rows, one per image, in the order of `images`.

        Raises:
            DataError: at the first row that can't be built
        """
        for image in self.images:
            yield {
                "image": self.source(image),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "objects": self.objects(image, report),
            }

    def objects(self, image: Entry, report: Report = raise_problem) -> list[Entry]:
        """The annotations of one image as a row's `objects`, each with its mask as a valid RLE."""
        found = (self._object(entry, image, report) for entry in self.annotations.get(image["id"], []))
        return [entry for entry in found if entry is not None]

    def _object(self, entry: Entry, image: Entry, report: Report) -> Entry | None:
        counts = self._counts(entry, image, report)
        if counts is None:
            return None
        box, area = entry.get("bbox"), entry.get("area")
        if box is not None and not _is_box(box):
            problem = f"expected a `bbox` of four numbers x, y, width, height, got {rle.brief(box)}. Correct it."
            report("bad-box", self.name, [entry["id"]], f"{self.full_name(entry, image)}: {problem}", image["id"])
            box = None
        if area is not None and not (_is_finite(area) and area >= 0):
            problem = f"expected an `area` in pixels, got {rle.brief(area)}. Correct it or leave it out."
            report("bad-area", self.name, [entry["id"]], f"{self.full_name(entry, image)}: {problem}", image["id"])
            area = None
        if box is None or area is None:
            runs = rle.read_runs(counts, image["height"], image["width"])
            x0, y0, x1, y1 = rle.box_of(runs, image["height"])
            box = [x0, y0, x1 - x0, y1 - y0] if box is None else box
            area = rle.area(runs) if area is None else area
        return {
            "id": entry["id"],
            "category_id": entry["category_id"],
            "bbox": [float(value) for value in box],
            "area": float(area),  # the file's own, which official COCO scores use
            "iscrowd": bool(entry.get("iscrowd", 0)),
            "counts": counts,
        }

    def _counts(self, entry: Entry, image: Entry, report: Report) -> str | None:
        segmentation, height, width = entry.get("segmentation"), image["height"], image["width"]
        try:
            return masks.to_counts(segmentation, height, width, "")
        except MaskError:
            pass  # the annotation's name is only put together, which takes time, where it is needed
        try:
            return masks.to_counts(segmentation, height, width, self.full_name(entry, image))
        except MaskError as error:
            report("bad-mask", self.name, [entry["id"]], str(error), image["id"])
        return None

    def full_name(self, entry: Entry, image: Entry) -> str:
        """An annotation in messages, with the split that it is in."""
        return f"{self.name}: {self.annotation_name(entry, image)}"

    def annotation_name(self, entry: Entry, image: Entry) -> str:
        """An annotation in messages."""
        return f"annotation {entry['id']} of image {image['id']} ({image['file_name']})"


@dataclass(frozen=True)
class FolderSplit(SplitAnnotations):
    """A split whose images are files in a folder, as in COCO and YOLO datasets."""

    folder: Path

    def source(self, image: Entry) -> Entry:
        """The path of the image file; the file itself may be missing."""
        name = image["file_name"]
        path = f"{self._root}/{name}"
        if not {"/", "\\", "\0"}.isdisjoint(name) or name in (".", "..") or os.path.islink(path):  # noqa: PTH114
            path = self._path_inside(image)
        return {"path": path, "bytes": None}

    def _path_inside(self, image: Entry) -> str:
        """The path of a file name with folders or links; the message names the right file name where it is known."""
        name = image["file_name"]
        try:
            return resolve_inside(self.folder, name, f"{self.name}: image {image['id']} ({name})")
        except DataError as error:
            found = self.find_by_base_name(image)
            if found is None:
                raise
            raise DataError(f"{error} The folder has a file of that name: write {found!r}.") from None

    def find_by_base_name(self, image: Entry) -> str | None:
        """The right `file_name` for a path of another machine: the file with the same last part, in the image folder
        or its subfolder `images`. None where there is none, or where two images have the same last part.
        """
        base = _base_name(image["file_name"])
        if self._base_names[base] != 1 or not base or "\0" in base:
            return None
        for name in (base, f"images/{base}"):
            path = os.path.realpath(self.folder / name)
            if path.startswith(self._root.rstrip("/") + "/") and os.path.isfile(path):  # noqa: PTH113
                return name
        return None

    @cached_property
    def _base_names(self) -> Counter[str]:
        return Counter(_base_name(image["file_name"]) for image in self.images)

    @cached_property
    def _root(self) -> str:
        return os.path.realpath(self.folder)


def resolve_inside(folder: Path, name: str, where: str) -> str:
    """The path of a `file_name`, which must stay inside its image folder, also after links are followed.

    Raises:
        DataError: an absolute path, `..`, a link out of the folder, a NUL, or Windows separators
    """
    if "\\" in name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(
            f"{where}: expected a `file_name` relative to {folder} with / between folders, without '..', got {name!r}."
            " Correct the file name."
        )
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))  # noqa: PTH118 (called for every image with folders in its name)
    if not path.startswith(root.rstrip("/") + "/"):
        raise DataError(
            f"{where}: `file_name` {name!r} leads out of {folder}, to {path}. Copy the file into the folder."
        )
    return path


def _base_name(name: str) -> str:
    """The last part of a path with / or \\."""
    return PureWindowsPath(name).name


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0


def _is_finite(value: object) -> bool:
    return type(value) in _NUMBERS and -1e15 < value < 1e15  # type: ignore[operator]


def read_annotations(files: SplitFiles, report: Report = raise_problem) -> FolderSplit:
    """Read and check the annotation file of one split.

    Raises:
        DataError: it isn't readable COCO; the message names the file, the ids and the remedy
    """
    path, name = files.annotations, str(files.annotations)
    content = _parse(path)
    images, entries, categories = (_list_of(content, key, name) for key in ("images", "annotations", "categories"))
    if not images:
        raise DataError(f"{name}: `images` is empty. Add images, or remove the split.")
    images = check_images(images, name, report)
    names = _check_categories(categories, {rle.brief(one.get("category_id")) for one in entries}, name, report)
    groups: dict[int, list[Entry]] = {image["id"]: [] for image in images}
    for entry in _check_annotations(entries, name, report, images=groups, categories=names):
        groups[entry["image_id"]].append(entry)
    return FolderSplit(name, tuple(images), groups, names, _image_folder(files, images))


def _parse(path: Path) -> Mapping[str, Any]:
    collecting = gc.isenabled()
    gc.disable()  # of millions of new objects none is garbage; looking for some would take a fifth of the time
    try:
        content = json.loads(b"".join(file_parts(path)).decode("utf-8-sig"), object_hook=pack_polygons)
    except OSError as error:
        raise DataError(f"{path}: the annotation file can't be read ({error}). Check path and permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got another encoding ({error}). Save it as UTF-8.") from error
    except RecursionError as error:
        raise DataError(f"{path}: the JSON is nested too deeply to be COCO. Export it again.") from error
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON ({error}): the file is truncated or damaged. Export it again."
        ) from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a COCO object with images, annotations and categories, got a {type_name(content)}."
        )
    return content


def pack_polygons(entry: Entry) -> Entry:
    """The entry with well-formed polygons as arrays of float64, which take a quarter of the memory of lists."""
    parts = entry.get("segmentation")
    if type(parts) is list and all(type(part) is list and set(map(type, part)) <= _NUMBERS for part in parts):
        try:
            entry["segmentation"] = [array("d", part) for part in parts]
        except OverflowError:  # an integer beyond the range of float64; the polygon's check reports it
            return entry
    return entry


def _list_of(content: Mapping[str, Any], key: str, name: str) -> list[Entry]:
    value = content.get(key)
    if not isinstance(value, list):
        found = (
            f"a {type_name(value)}"
            if key in content
            else f"only {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
        )
        raise DataError(f"{name}: expected a list under the key {key!r}, got {found}. Export it as COCO segmentation.")
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise DataError(
                f"{name}: expected objects in {key!r}, got a {type_name(entry)} at index {i}. Correct that entry."
            )
    return value


def check_images(images: list[Entry], name: str, report: Report) -> list[Entry]:
    """The image entries with a unique id, a file name and a size."""
    valid = []
    for image in _unique(_with_ids(images, ("id",), "image", name, report), "image", name, report):
        file_name, where = image.get("file_name"), f"{name}: image {image['id']}"
        sides: list[Any] = [image.get("height"), image.get("width")]
        if not file_name or not is_text(file_name):
            problem = f"{where}: expected a `file_name`, got {rle.brief(file_name)}. Correct it."
        elif not all(type(side) is int and side > 0 for side in sides) or sides[0] * sides[1] > rle.MAX_PIXELS:
            problem = (
                f"{where} ({file_name}): expected `height` and `width` as whole numbers from 1, of at most"
                f" {rle.MAX_PIXELS:,} pixels together, got {' and '.join(map(rle.brief, sides))}. Correct them."
            )
        else:
            valid.append(image)
            continue
        report("bad-image-entry", name, [image["id"]], problem)
    return valid


def _check_categories(categories: list[Entry], used: set[str], name: str, report: Report) -> dict[int, str]:
    """Names by category id; an id that no annotation uses may have several. `used` has the ids in brief."""
    names: dict[int, str] = {}
    repeated = []
    for category in _with_ids(categories, ("id",), "category", name, report):
        key, text = category["id"], category.get("name")
        is_used = rle.brief(key) in used
        if not isinstance(text, str) or not is_text(text):
            problem = f"{name}: category {key}: expected a `name`, got {rle.brief(text)}."
            report("bad-category-entry", name, [key], f"{problem} Correct it.")
        elif key not in names:
            names[key] = text
        elif is_used and names[key].strip() != text.strip():
            problem = f"{name}: category {key} is named both {names[key]!r} and {text!r}. Give each class its own id."
            report("two-category-names", name, [key], problem)
        elif is_used:
            repeated.append(key)
    if repeated:
        message = f"{name}: category ids must be unique, found more than once: {listed(repeated)}. Renumber them."
        report("duplicate-category-id", name, repeated, message)
    return names


def _check_annotations(
    entries: list[Entry], name: str, report: Report, *, images: Mapping[int, object], categories: Mapping[int, str]
) -> list[Entry]:
    """The annotation entries with a unique id, an image, a category and a valid `iscrowd`."""
    tests: tuple[tuple[str, Callable[[Entry], bool], str], ...] = (
        ("bad-crowd", lambda entry: entry.get("iscrowd", 0) not in (0, 1), "have an `iscrowd` that isn't 0 or 1"),
        (
            "orphan-annotation",
            lambda entry: entry["image_id"] not in images,
            "refer to an image that isn't in `images`",
        ),
        (
            "unknown-category",
            lambda entry: entry["category_id"] not in categories,
            "refer to a category that isn't in `categories`",
        ),
    )
    valid = _with_ids(entries, ("id", "image_id", "category_id"), "annotation", name, report)
    valid = _unique(valid, "annotation", name, report)
    for kind, is_wrong, what in tests:
        ids = [entry["id"] for entry in valid if is_wrong(entry)]
        if ids:
            message = f"{name}: {len(ids)} annotation(s) {what}: ids {listed(ids)}. Correct or remove them."
            report(kind, name, ids, message)
            valid = [entry for entry in valid if not is_wrong(entry)]
    return valid


def _with_ids(entries: list[Entry], keys: tuple[str, ...], kind: str, name: str, report: Report) -> list[Entry]:
    """The entries whose ids are integers of 64 bits."""
    valid = []
    for i, entry in enumerate(entries):
        key = next((key for key in keys if type(entry.get(key)) is not int or abs(entry[key]) > _LARGEST_ID), None)
        if key is None:
            valid.append(entry)
            continue
        hint = " (ids are numbers, not text)" if isinstance(entry.get(key), str) else ""
        found = f"got {rle.brief(entry[key])}" if key in entry else "found none"
        label = f"{kind} {rle.brief(entry['id'])}" if "id" in entry and key != "id" else f"{kind} at index {i}"
        message = f"{name}: {label}: expected a whole number as `{key}`, {found}{hint}. Correct it."
        report(f"bad-{kind}-entry", name, [rle.brief(entry.get("id"))], message)
    return valid


def _unique(entries: list[Entry], kind: str, name: str, report: Report) -> list[Entry]:
    """One entry for each id; further annotations with the same id are renumbered, so that no object is lost."""
    counts = Counter(entry["id"] for entry in entries)
    repeated = [key for key, count in counts.items() if count > 1]
    if not repeated:
        return entries
    message = f"{name}: {kind} ids must be unique, found more than once: {listed(repeated)}. Renumber them."
    report(f"duplicate-{kind}-id", name, repeated, message)
    kept: dict[int, Entry] = {}
    unused = max(counts) + 1
    for entry in entries:
        if entry["id"] not in kept:
            kept[entry["id"]] = entry
        elif kind == "annotation":
            kept[unused] = {**entry, "id": unused}
            unused += 1
    return list(kept.values())


def _image_folder(files: SplitFiles, images: list[Entry]) -> Path:
    """The candidate folder with the first image that is found; missing images are found by the check of images."""
    folders = [folder for folder in files.image_folders if folder.is_dir()]
    for image in images[:20]:
        name = image["file_name"]
        for folder in folders if "\0" not in name and len(name) < 4096 else ():
            if os.path.lexists(folder / name):
                return folder
    if not folders:
        tried = ", ".join(map(str, files.image_folders))
        raise DataError(
            f"{files.annotations}: found none of its image folders: {tried}. Put the images in one of them."
        )
    return folders[0]


def is_text(value: object) -> bool:
    """Whether this is text that can be encoded as UTF-8."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def type_name(value: object) -> str:
    """The type of a JSON value, for messages."""
    return "null" if value is None else type(value).__name__
