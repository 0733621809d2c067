"""Rows of datasets on the Hub as COCO entries, checked as those of an annotation file are.

Rows are ours, as `load_coco` built them before they were uploaded, or of another's making: an image, and objects as a
list of objects or as an object of lists. What is on the Hub may be of any making, and its masks go to C code.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from m2f_trainer.data.annotations import AnnotationFile, packed
from m2f_trainer.data.entries import Entry, sound_images, type_of
from m2f_trainer.data.findings import Key, Report, refuse
from m2f_trainer.data.images import image_size
from m2f_trainer.data.rle import brief
from m2f_trainer.errors import DataError, ImageError

CATEGORY_KEYS = ("category_id", "category", "categories", "label", "labels", "class")
_MASK_KEYS = ("segmentation", "segmentations", "segments", "polygons", "counts")
_PER_ROW = 100_000  # numbers that are kept for the objects of a row


class Stored(Protocol):
    """Rows that can be read one by one, in any order."""

    def __getitem__(self, place: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class HubSplit(AnnotationFile):
    """The rows of a split as an annotation file; images stay where they are stored until they are looked at."""

    ours: bool
    stored: Stored
    places: Mapping[int, int]  # image id -> row

    def source(self, image: Entry) -> Entry:
        """Where an image's data is: mostly in the row itself."""
        return dict(self.stored[self.places[image["id"]]].get("image") or {})

    def place(self, entry: Entry, image: Entry) -> str:
        """An object in messages, by its id or its place."""
        if self.ours:
            return f"annotation {entry['id']} of image {image['id']}"
        row, place = divmod(entry["id"] - 1, _PER_ROW)
        return f"row {row}, object {place}"


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one split; `categories` are those that its objects may have."""

    where: str  # dataset and split, as messages name them
    ours: bool
    categories: Mapping[int, str] = field(default_factory=dict)

    def __call__(self, row: Mapping[str, Any], number: int) -> Entry:
        """The row as one of ours.

        Raises:
            DataError: at the first thing wrong with it, naming row, object and remedy
        """
        found = self.read(row, number, refuse)
        split = self._split([found] if found else [], [row], {found[0]["id"]: 0} if found else {})
        made = next(split.rows())
        return dict(row) if self.ours else {**made, "categories": None}

    def split(self, rows: Iterable[Mapping[str, Any]], stored: Stored, report: Report) -> HubSplit:
        """All rows; what is wrong with a row goes to the report, and what is wrong with an object when it is built."""
        found: dict[int, tuple[Entry, list[Entry]]] = {}
        places: dict[int, int] = {}
        for number, row in enumerate(rows):
            read = self.read(row, number, report)
            if read is None:
                continue
            image_id = read[0]["id"]
            if image_id in found:
                report("duplicate-image-id", self.where, [image_id], self.used_twice(image_id, number), image_id)
                continue
            found[image_id] = (read[0], [packed(one) for one in read[1]])
            places[image_id] = number
        return self._split(list(found.values()), stored, places)

    def used_twice(self, image_id: int, number: int) -> str:
        return f"{self.where}, row {number}: image_id {image_id} is used twice. Renumber the images."

    def _split(self, found: list[tuple[Entry, list[Entry]]], stored: Stored, places: Mapping[int, int]) -> HubSplit:
        images = tuple(image for image, _ in found)
        groups = {image["id"]: entries for image, entries in found}
        return HubSplit(Path(self.where), Path(), images, groups, self.categories, self.ours, stored, places)

    def read(self, row: Mapping[str, Any], number: int, report: Report) -> tuple[Entry, list[Entry]] | None:
        """The image and its annotations as COCO entries; None for a row that has no usable image."""
        image = self._image(row, number, report)
        if image is None:
            return None
        try:
            objects = listed(row["objects"], f"{self.where}, row {number}")
        except DataError as error:
            report("bad-annotation-entry", self.where, [image["id"]], str(error), image["id"])
            objects = []
        found = (self._entry(one, image, number, place, report) for place, one in enumerate(objects))
        return image, [entry for entry in found if entry is not None]

    def _image(self, row: Mapping[str, Any], number: int, report: Report) -> Entry | None:
        where, given = f"{self.where}, row {number}", row.get("image_id")
        if self.ours:
            height, width = row["height"], row["width"]
        else:
            given = given if type(given) is int else number
            try:
                height, width = image_size(row["image"] or {}, where)
            except ImageError as error:
                report("bad-image", self.where, [given], str(error))
                return None
        image = {"id": given, "file_name": f"{given}.png", "height": height, "width": width}
        sound = sound_images([image], Path(where), _under(self.where, report))
        return sound[0] if sound else None

    def _entry(self, one: Any, image: Entry, number: int, place: int, report: Report) -> Entry | None:
        """An object as a COCO annotation, None where it can't be tied to a category."""
        where, own_id = f"{self.where}, row {number}, object {place}", number * _PER_ROW + place + 1
        kind, problem = self._problem(one)
        if problem:
            report(kind, self.where, [own_id], f"{where}: {problem}", image["id"])
            return None
        mask = next((one[key] for key in _MASK_KEYS if one.get(key) is not None), None)
        if isinstance(mask, str):
            mask = {"size": [image["height"], image["width"]], "counts": mask}
        return {
            "id": one["id"] if self.ours else own_id,
            "image_id": image["id"],
            "category_id": category_of(one),
            "segmentation": mask,
            "bbox": one.get("bbox"),
            "area": one.get("area"),
            "iscrowd": int(one.get("iscrowd") or 0),
        }

    def _problem(self, one: Any) -> tuple[str, str]:
        """The kind of finding and what is wrong, "" for nothing."""
        if not isinstance(one, Mapping):
            return "bad-annotation-entry", f"expected an object, got a {type_of(one)}. Remove it."
        lacking = [key for key in ("id", "bbox", "area", "iscrowd", "counts") if self.ours and one.get(key) is None]
        if lacking:
            return "bad-annotation-entry", f"expected a value for {', '.join(lacking)}, got null. Upload the set again."
        category = category_of(one)
        if category is None:
            found = ", ".join(f"{key} {brief(one[key])}" for key in CATEGORY_KEYS if key in one) or sorted(one)
            return "bad-annotation-entry", f"expected a whole number as category, got {found}. Add category_id."
        if category not in self.categories:
            known = ", ".join(map(str, sorted(self.categories)[:10]))
            return "unknown-category", f"category {category} isn't among those named: {known}. Correct or remove it."
        if one.get("iscrowd") not in (None, 0, 1):
            return "bad-crowd", f"expected an `iscrowd` of 0 or 1, got {brief(one['iscrowd'])}. Correct it."
        return "", ""


def category_of(one: Mapping[str, Any]) -> int | None:
    """An object's category, None where there is no whole number for it."""
    return next((int(one[key]) for key in CATEGORY_KEYS if type(one.get(key)) is int), None)


def listed(objects: Any, where: str) -> list[Any]:
    """Objects one by one, from a list of objects or an object of lists.

    Raises:
        DataError: it is neither
    """
    if isinstance(objects, list):
        return objects
    if not isinstance(objects, Mapping):
        raise DataError(
            f"{where}: expected a list as objects, got a {type_of(objects)}. Write an empty list where there are none."
        )
    lists = {key: value for key, value in objects.items() if isinstance(value, list)}
    lengths = {key: len(value) for key, value in lists.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{count} {key}" for key, count in lengths.items())
        raise DataError(f"{where}: expected as many values of each kind as objects, got {told}. Add what is missing.")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _under(name: str, report: Report) -> Report:
    """The report, with all problems under one file."""

    def told(kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None:
        report(kind, name, ids, message, image)

    return told
