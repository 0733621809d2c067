"""One COCO annotation file, read and checked: every reference, id and number, before anything is built from it.

Problems of one kind are reported together: the first ten ids and how many there are.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from m2f_trainer.data import masks, rle
from m2f_trainer.data.layouts import SplitFiles
from m2f_trainer.errors import DataError

Entry: TypeAlias = dict[str, Any]

_LARGEST_ID = 2**63 - 1


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
        """The dataset rows, in the file's order of images."""
        for image in self.images:
            where = f"{self.path}: image {image['id']} ({image['file_name']})"
            yield {
                "image": {"path": str(resolve_inside(self.folder, image["file_name"], where)), "bytes": None},
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "objects": [self._object(entry, image) for entry in self.annotations.get(image["id"], [])],
            }

    def _object(self, entry: Entry, image: Entry) -> Entry:
        where = f"{self.path}: annotation {entry['id']} of image {image['id']} ({image['file_name']})"
        height, width = image["height"], image["width"]
        counts = masks.to_counts(entry.get("segmentation"), height, width, where)
        return {
            "id": entry["id"],
            "category_id": entry["category_id"],
            "bbox": _bbox(entry, counts, height, width, where),
            "area": _area(entry, counts, height, width, where),
            "iscrowd": bool(entry.get("iscrowd", 0)),
            "counts": counts,
        }


def read_annotations(files: SplitFiles) -> AnnotationFile:
    """Reads and checks one split's file.

    Raises:
        DataError: it isn't readable COCO; the message names the file, the ids and the remedy
    """
    path = files.annotations
    content = _parse(path)
    images, entries, categories = (_list_of(content, key, path) for key in ("images", "annotations", "categories"))
    _check_images(images, path)
    _check_entries(entries, path)
    names = _names_of(categories, path)
    groups: dict[int, list[Entry]] = {image["id"]: [] for image in images}
    _refuse(entries, lambda entry: entry["image_id"] not in groups, "refer to an image that isn't in `images`", path)
    _refuse(
        entries, lambda entry: entry["category_id"] not in names, "refer to a category that isn't in `categories`", path
    )
    for entry in entries:
        groups[entry["image_id"]].append(entry)
    return AnnotationFile(path, _image_folder(files, images), tuple(images), groups, names)


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
    path = os.path.realpath(os.path.join(root, name))  # noqa: PTH118 (called for every image of a large set)
    if not path.startswith(root.rstrip("/") + "/"):
        raise DataError(
            f"{where}: `file_name` {name!r} leads out of {folder}, to {path}. Copy the file into the folder."
        )
    return Path(path)


def _parse(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
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
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a COCO object with images, annotations and categories, got a {_type(content)}."
        )
    return content


def _list_of(content: Mapping[str, Any], key: str, path: Path) -> list[Entry]:
    value = content.get(key)
    if not isinstance(value, list):
        found = (
            f"a {_type(value)}" if key in content else f"only {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
        )
        raise DataError(f"{path}: expected a list under the key {key!r}, got {found}. Export it as COCO segmentation.")
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}: expected objects in {key!r}, got a {_type(entry)} at place {i}. Correct that entry."
            )
    return value


def _check_images(images: list[Entry], path: Path) -> None:
    if not images:
        raise DataError(f"{path}: `images` is empty. Add images, or remove the split.")
    _check_ids(images, "id", "image", path)
    _check_unique(images, "image", path)
    for image in images:
        name, where = image.get("file_name"), f"{path}: image {image['id']}"
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: expected a `file_name`, got {_quote(name)}. Add it.")
        sides: list[Any] = [image.get("height"), image.get("width")]
        if not all(type(side) is int and side > 0 for side in sides) or sides[0] * sides[1] > rle.MAX_PIXELS:
            raise DataError(
                f"{where} ({name}): expected `height` and `width` as whole numbers from 1, of at most"
                f" {rle.MAX_PIXELS:,} pixels together, got {_quote(sides[0])} and {_quote(sides[1])}. Correct them."
            )


def _check_entries(entries: list[Entry], path: Path) -> None:
    for key in ("id", "image_id", "category_id"):
        _check_ids(entries, key, "annotation", path)
    _check_unique(entries, "annotation", path)
    _refuse(entries, lambda entry: entry.get("iscrowd", 0) not in (0, 1), "have an `iscrowd` that isn't 0 or 1", path)


def _names_of(categories: list[Entry], path: Path) -> dict[int, str]:
    _check_ids(categories, "id", "category", path)
    _check_unique(categories, "category", path)
    for category in categories:
        if not isinstance(category.get("name"), str):
            raise DataError(
                f"{path}: category {category['id']}: expected a `name`, got {_quote(category.get('name'))}."
            )
    return {category["id"]: category["name"] for category in categories}


def _check_ids(entries: list[Entry], key: str, kind: str, path: Path) -> None:
    for i, entry in enumerate(entries):
        value = entry.get(key)
        if type(value) is not int or abs(value) > _LARGEST_ID:
            hint = " (ids are numbers, not text)" if isinstance(value, str) else ""
            found = f"got {_quote(value)}" if key in entry else "found none"
            name = f"{kind} {_quote(entry['id'])}" if "id" in entry and key != "id" else f"{kind} at place {i}"
            raise DataError(f"{path}: {name}: expected a whole number as `{key}`, {found}{hint}. Correct it.")


def _check_unique(entries: list[Entry], kind: str, path: Path) -> None:
    twice = [key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {kind} ids must be unique, found more than once: {_some(twice)}. Renumber them.")


def _refuse(entries: list[Entry], wrong: Callable[[Entry], bool], what: str, path: Path) -> None:
    ids = [entry["id"] for entry in entries if wrong(entry)]
    if ids:
        raise DataError(f"{path}: {len(ids)} annotation(s) {what}: ids {_some(ids)}. Correct or remove them.")


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


def _bbox(entry: Entry, counts: str, height: int, width: int, where: str) -> list[float]:
    """The file's box (x, y, width, height); the mask's where it has none."""
    if entry.get("bbox") is None:
        x0, y0, x1, y1 = rle.box_of(rle.read_runs(counts, height, width, where), height)
        return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)) or min(box[2:]) < 0:
        raise DataError(
            f"{where}: expected a `bbox` of four numbers x, y, width, height, got {_quote(box)}. Correct it."
        )
    return [float(value) for value in box]


def _area(entry: Entry, counts: str, height: int, width: int, where: str) -> float:
    """The file's area, which the official scores use; the mask's where it has none."""
    if entry.get("area") is None:
        return float(rle.area(rle.read_runs(counts, height, width, where)))
    if not _is_finite(entry["area"]) or entry["area"] < 0:
        raise DataError(
            f"{where}: expected an `area` in pixels, got {_quote(entry['area'])}. Correct it or leave it out."
        )
    return float(entry["area"])


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15 and math.isfinite(value)  # type: ignore[arg-type]


def _some(values: Iterable[object]) -> str:
    """The first ten, and how many there are."""
    listed = list(values)
    return ", ".join(map(str, listed[:10])) + (f", ... ({len(listed)} in all)" if len(listed) > 10 else "")


def _quote(value: object) -> str:
    return rle.brief(value)


def _type(value: object) -> str:
    return "null" if value is None else type(value).__name__
