"""One COCO annotation file, read and checked: every reference, id and number, before anything is built from it.

Every problem goes to a `Report`; the faulty part is then left out, unless the report raised.
"""

import gc
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

from m2f_trainer.data.layouts import SplitFiles
from m2f_trainer.data.problems import Report, refuse, some
from m2f_trainer.errors import DataError, MaskError
from m2f_trainer.masks import rle
from m2f_trainer.masks import segmentation as masks


def resolve_inside(folder: Path, name: str, where: str) -> Path:
    """The path of a `file_name`, which must stay inside its image folder, links followed.

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
    return Path(path)


def found_by_name(folder: Path, name: str) -> str | None:
    """The `file_name` of a file in the folder or its `images` that is called as `name` is at its end."""
    base, root = base_of(name), os.path.realpath(folder)
    for found in (base, f"images/{base}") if base and "\0" not in base else ():
        path = os.path.realpath(folder / found)
        if path.startswith(root.rstrip("/") + "/") and os.path.isfile(path):  # noqa: PTH113
            return found
    return None


def base_of(name: str) -> str:
    """A path's last part, after / and \\."""
    return PureWindowsPath(name).name


Entry: TypeAlias = dict[str, Any]

_LARGEST_ID = 2**63 - 1
_HALF = re.compile("[\ud800-\udfff]")  # half a character, as left where a tool cut a name: no file can hold it


def list_of(content: Mapping[str, Any], key: str, path: Path) -> list[Entry]:
    value = content.get(key)
    if not isinstance(value, list):
        found = (
            f"a {type_of(value)}" if key in content else f"only {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
        )
        raise DataError(f"{path}: expected a list under the key {key!r}, got {found}. Export it as COCO segmentation.")
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}: expected objects in {key!r}, got a {type_of(entry)} at place {i}. Correct that entry."
            )
    return value


def sound_images(images: list[Entry], path: Path, report: Report) -> list[Entry]:
    sound = []
    for image in _unique(_with_ids(images, ("id",), "image", path, report), "image", path, report):
        name, where = image.get("file_name"), f"{path}: image {image['id']}"
        sides: list[Any] = [image.get("height"), image.get("width")]
        if not name or not is_text(name):
            problem = f"{where}: expected a `file_name`, got {rle.brief(name)}. Correct it."
        elif not all(type(side) is int and side > 0 for side in sides) or sides[0] * sides[1] > rle.MAX_PIXELS:
            problem = (
                f"{where} ({name}): expected `height` and `width` as whole numbers from 1, of at most"
                f" {rle.MAX_PIXELS:,} pixels together, got {' and '.join(map(rle.brief, sides))}. Correct them."
            )
        else:
            sound.append(image)
            continue
        report("bad-image-entry", path, [image["id"]], problem)
    return sound


def sound_entries(
    entries: list[Entry], path: Path, report: Report, *, images: Mapping[int, object], categories: Mapping[int, str]
) -> list[Entry]:
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
    sound = _with_ids(entries, ("id", "image_id", "category_id"), "annotation", path, report)
    sound = _unique(sound, "annotation", path, report)
    for kind, wrong, what in tests:
        ids = [entry["id"] for entry in sound if wrong(entry)]
        if ids:
            message = f"{path}: {len(ids)} annotation(s) {what}: ids {some(ids)}. Correct or remove them."
            report(kind, path, ids, message)
            sound = [entry for entry in sound if not wrong(entry)]
    return sound


def names_of(categories: list[Entry], path: Path, report: Report) -> dict[int, str]:
    names = {}
    for category in _unique(_with_ids(categories, ("id",), "category", path, report), "category", path, report):
        if is_text(category.get("name")):
            names[category["id"]] = category["name"]
        else:
            problem = f"{path}: category {category['id']}: expected a `name`, got {rle.brief(category.get('name'))}."
            report("bad-category-entry", path, [category["id"]], f"{problem} Correct it.")
    return names


def _with_ids(entries: list[Entry], keys: tuple[str, ...], kind: str, path: Path, report: Report) -> list[Entry]:
    """The entries whose ids are whole numbers."""
    sound = []
    for i, entry in enumerate(entries):
        key = next((key for key in keys if type(entry.get(key)) is not int or abs(entry[key]) > _LARGEST_ID), None)
        if key is None:
            sound.append(entry)
            continue
        hint = " (ids are numbers, not text)" if isinstance(entry.get(key), str) else ""
        found = f"got {rle.brief(entry[key])}" if key in entry else "found none"
        name = f"{kind} {rle.brief(entry['id'])}" if "id" in entry and key != "id" else f"{kind} at place {i}"
        message = f"{path}: {name}: expected a whole number as `{key}`, {found}{hint}. Correct it."
        report(f"bad-{kind}-entry", path, [rle.brief(entry.get("id"))], message)
    return sound


def _unique(entries: list[Entry], kind: str, path: Path, report: Report) -> list[Entry]:
    """The entries with one for each id; annotations are renumbered rather than lost."""
    counts = Counter(entry["id"] for entry in entries)
    twice = [key for key, count in counts.items() if count > 1]
    if not twice:
        return entries
    message = f"{path}: {kind} ids must be unique, found more than once: {some(twice)}. Renumber them."
    report(f"duplicate-{kind}-id", path, twice, message)
    kept: dict[int, Entry] = {}
    fresh = max(counts) + 1
    for entry in entries:
        if entry["id"] not in kept:
            kept[entry["id"]] = entry
        elif kind == "annotation":
            kept[fresh] = {**entry, "id": fresh}
            fresh += 1
    return list(kept.values())


def is_text(value: object) -> bool:
    """Whether this is text that can be written again."""
    return isinstance(value, str) and not _HALF.search(value)


def type_of(value: object) -> str:
    """A JSON value's type as messages call it."""
    return "null" if value is None else type(value).__name__


_NUMBERS = {int, float}


@dataclass(frozen=True)
class AnnotationFile:
    """A checked file: ids are whole and unique, annotations grouped by an image that exists, categories known."""

    path: Path
    folder: Path
    images: tuple[Entry, ...]
    annotations: Mapping[int, list[Entry]]
    categories: Mapping[int, str]

    def used_categories(self) -> set[int]:
        return {entry["category_id"] for group in self.annotations.values() for entry in group}

    def rows(self) -> Iterator[Entry]:
        """The dataset rows, in the file's order of images, once: annotations are let go as their rows are made, so that
        a large file needs no memory for both.

        Raises:
            DataError: at the first row that can't be built
        """
        for image in self.images:
            yield {
                "image": self.source(image),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "objects": self.objects(image),
            }
            self.annotations[image["id"]].clear()

    def source(self, image: Entry) -> Entry:
        """Where an image's data is, as datasets write it. Raises DataError for a path that leaves the folder."""
        name = image["file_name"]
        path = f"{self._root}/{name}"
        if not {"/", "\\", "\0"}.isdisjoint(name) or name in (".", "..") or os.path.islink(path):  # noqa: PTH114
            path = self._inside(image)
        return {"path": path, "bytes": None}

    def _inside(self, image: Entry) -> str:
        """The path of a name that may lead anywhere. Raises DataError, with the name to write where it is known."""
        name = image["file_name"]
        try:
            return str(resolve_inside(self.folder, name, f"{self.path}: image {image['id']} ({name})"))
        except DataError as error:
            found = self.found_elsewhere(image)
            if found is None:
                raise
            raise DataError(f"{error} A file of that name is there: write {found!r}.") from None

    def found_elsewhere(self, image: Entry) -> str | None:
        """The `file_name` of the one file of an image's name in the folder or its `images`, where a tool wrote the
        path of another machine; None where there is none, or two images have this name.
        """
        return found_by_name(self.folder, image["file_name"]) if self._times[base_of(image["file_name"])] == 1 else None

    @cached_property
    def _times(self) -> Counter[str]:
        return Counter(base_of(image["file_name"]) for image in self.images)

    @cached_property
    def _root(self) -> str:
        return os.path.realpath(self.folder)

    def objects(self, image: Entry, report: Report = refuse) -> list[Entry]:
        """The annotations of one image, each with its mask as a valid RLE."""
        found = (self._object(entry, image, report) for entry in self.annotations.get(image["id"], []))
        return [entry for entry in found if entry is not None]

    def _object(self, entry: Entry, image: Entry, report: Report) -> Entry | None:
        counts = self._counts(entry, image, report)
        if counts is None:
            return None
        for kind, problem in (("bad-box", _box_problem(entry)), ("bad-area", _area_problem(entry))):
            if problem:
                report(kind, self.path, [entry["id"]], f"{self.name(entry, image)}: {problem}", image["id"])
        height, width = image["height"], image["width"]
        return {
            "id": entry["id"],
            "category_id": entry["category_id"],
            "bbox": _bbox(entry, counts, height, width),
            "area": _area(entry, counts, height, width),
            "iscrowd": bool(entry.get("iscrowd", 0)),
            "counts": counts,
        }

    def _counts(self, entry: Entry, image: Entry, report: Report) -> str | None:
        segmentation, height, width = entry.get("segmentation"), image["height"], image["width"]
        try:
            return masks.to_counts(segmentation, height, width, "")
        except MaskError:
            pass  # only now is it worth the time to put its name together
        try:
            return masks.to_counts(segmentation, height, width, self.name(entry, image))
        except MaskError as error:
            report("bad-mask", self.path, [entry["id"]], str(error), image["id"])
        return None

    def name(self, entry: Entry, image: Entry) -> str:
        return f"{self.path}: {self.place(entry, image)}"

    def place(self, entry: Entry, image: Entry) -> str:
        """An annotation in messages, its file aside."""
        return f"annotation {entry['id']} of image {image['id']} ({image['file_name']})"


def read_annotations(files: SplitFiles, report: Report = refuse) -> AnnotationFile:
    """Reads and checks one split's file.

    Raises:
        DataError: it isn't readable COCO; the message names the file, the ids and the remedy
    """
    path = files.annotations
    content = _parse(path)
    images, entries, categories = (list_of(content, key, path) for key in ("images", "annotations", "categories"))
    if not images:
        raise DataError(f"{path}: `images` is empty. Add images, or remove the split.")
    images = sound_images(images, path, report)
    names = names_of(categories, path, report)
    groups: dict[int, list[Entry]] = {image["id"]: [] for image in images}
    for entry in sound_entries(entries, path, report, images=groups, categories=names):
        groups[entry["image_id"]].append(entry)
    return AnnotationFile(path, _image_folder(files, images), tuple(images), groups, names)


def _parse(path: Path) -> Mapping[str, Any]:
    collecting = gc.isenabled()
    gc.disable()  # millions of objects, none of them garbage: a fifth of the time goes into looking for some
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=packed)
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
            f"{path}: expected a COCO object with images, annotations and categories, got a {type_of(content)}."
        )
    return content


def packed(entry: Entry) -> Entry:
    """An entry with well-formed polygons as arrays of doubles, in a quarter of the memory: large files fit."""
    parts = entry.get("segmentation")
    if type(parts) is list and all(type(part) is list and set(map(type, part)) <= _NUMBERS for part in parts):
        try:
            entry["segmentation"] = [array("d", part) for part in parts]
        except OverflowError:  # a whole number beyond a double's range, which the check of the polygon will name
            return entry
    return entry


def _image_folder(files: SplitFiles, images: list[Entry]) -> Path:
    """The candidate folder that holds the first image that is anywhere; missing ones are reported by the check."""
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


def _box_problem(entry: Entry) -> str:
    """What is wrong with an annotation's box, "" for nothing; none at all is fine."""
    box = entry.get("bbox")
    if box is None or (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0):
        return ""
    entry["bbox"] = None
    return f"expected a `bbox` of four numbers x, y, width, height, got {rle.brief(box)}. Correct it."


def _area_problem(entry: Entry) -> str:
    area = entry.get("area")
    if area is None or (_is_finite(area) and area >= 0):
        return ""
    entry["area"] = None
    return f"expected an `area` in pixels, got {rle.brief(area)}. Correct it or leave it out."


def _bbox(entry: Entry, counts: str, height: int, width: int) -> list[float]:
    """The file's box (x, y, width, height); the mask's where it has none."""
    if entry.get("bbox") is None:
        x0, y0, x1, y1 = rle.box_of(rle.read_runs(counts, height, width), height)
        return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]
    return [float(value) for value in entry["bbox"]]


def _area(entry: Entry, counts: str, height: int, width: int) -> float:
    """The file's area, which the official scores use; the mask's where it has none."""
    if entry.get("area") is None:
        return float(rle.area(rle.read_runs(counts, height, width)))
    return float(entry["area"])


def _is_finite(value: object) -> bool:
    return type(value) in _NUMBERS and -1e15 < value < 1e15  # type: ignore[operator]
