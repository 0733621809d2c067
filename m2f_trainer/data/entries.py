"""The three lists of a COCO file, entry by entry: ids that are whole and unique, names, sizes, references."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from m2f_trainer.data import rle
from m2f_trainer.data.findings import Report, some
from m2f_trainer.errors import DataError

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


def printable(text: str) -> str:
    """Text from a dataset without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def type_of(value: object) -> str:
    """A JSON value's type as messages call it."""
    return "null" if value is None else type(value).__name__
