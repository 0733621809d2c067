"""Datasets on the Hub: ours, as `DatasetDict.push_to_hub` leaves them, and others with image and objects columns."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import datasets

from m2f_trainer.data.coco_json import AnnotationFile, Entry, packed, sound_images, type_of
from m2f_trainer.data.dataset import (
    FEATURES,
    Category,
    advice_alone,
    describe_categories,
    features_of,
    load_coco,
    rows_with_validation,
    warn,
)
from m2f_trainer.data.images import image_size
from m2f_trainer.data.layouts import SPLITS
from m2f_trainer.data.problems import Key, Report, refuse
from m2f_trainer.errors import DataError, ImageError
from m2f_trainer.masks.rle import brief

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


def load_dataset(name: str | Path) -> datasets.DatasetDict:
    """The rows of a COCO or YOLO folder, or of a dataset on the Hub (`user/name`) or its downloaded folder.

    Raises:
        DataError: there is none, or it can't be used; the message names what and the remedy
    """
    return load_hub(str(name)) if is_hub_set(name) else load_coco(name)


def is_hub_set(name: str | Path) -> bool:
    """Whether this is a dataset of the Hub: by its name, or as a folder of Parquet files, as downloaded from there."""
    return is_hub_name(name) or any(Path(name).glob("*.parquet")) or any(Path(name).glob("data/*.parquet"))


def is_hub_name(name: str | Path) -> bool:
    """Whether this is `user/name` and no path of this machine."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(name)) is not None and not Path(name).exists()


def load_hub(name: str, **options: Any) -> datasets.DatasetDict:
    """The splits of a Hub dataset as rows, images embedded; `options` go to `datasets.load_dataset`.

    Raises:
        DataError: it can't be loaded, or has no image and objects columns that describe masks
    """
    splits = usable_splits(name, lambda: datasets.load_dataset(name, **options))
    known, kept = categories_of_all(name, splits), {}
    for split, rows in splits.items():
        reader = reader_of(name, split, rows, known)
        if reader.ours:
            for _ in checked(rows.remove_columns("image"), reader):
                pass
            kept[split] = named(plain(rows), known)
        else:
            kept[split] = keep(plain(rows), reader, known)
    found = rows_with_validation(kept)
    if len(found) > len(kept):
        warn(name, found)
    return found


def read_hub(name: str, report: Report, **options: Any) -> dict[str, HubSplit]:
    """The splits of a Hub dataset as the doctor reads them: what is wrong with a row goes to the report.

    Images are read where needed, and not kept.

    Raises:
        DataError: it can't be loaded, or has no image and objects columns
    """
    splits = usable_splits(name, lambda: datasets.load_dataset(name, **options))
    known, found = categories_of_all(name, splits), {}
    for split, stored in splits.items():
        reader, rows = reader_of(name, split, stored, known), plain(stored)
        light = rows.remove_columns("image") if reader.ours else rows
        found[split] = reader.split(light, rows.select_columns(["image"]), report)
    return found


def usable_splits(name: str, load: Callable[[], Mapping[str, datasets.Dataset]]) -> dict[str, datasets.Dataset]:
    """What was loaded, under our names of splits.

    Raises:
        DataError: it can't be loaded, or has no split or no columns of ours
    """
    try:
        loaded = load()
    except Exception as error:
        raise DataError(
            f"{name}: expected a folder, or a dataset on the Hub that you may read, but loading it failed"
            f" ({type(error).__name__}: {error}). Check the name, the network and HF_TOKEN."
        ) from error
    splits = {SPLITS[key]: rows for key, rows in loaded.items() if key in SPLITS}
    for split, rows in splits.items():
        columns = rows.column_names
        if not {"image", "objects"} <= set(columns):
            raise DataError(
                f"{name}, split {split!r}: expected columns image and objects, found {', '.join(columns) or 'none'}."
                " Rename the columns."
            )
    if not splits:
        raise DataError(f"{name}: expected splits {', '.join(SPLITS)}, found {', '.join(loaded)}. Rename the splits.")
    return splits


def is_ours(rows: datasets.Dataset) -> bool:
    """Whether rows were built by `load_coco` before they were uploaded."""
    same = all(rows.features.get(key) == FEATURES[key] for key in ("image_id", "height", "width", "objects"))
    return same and bool(stored_categories(rows))


def stored_categories(rows: datasets.Dataset) -> tuple[Category, ...]:
    """The categories that rows of ours carry in their features, none for those of another's making."""
    label = rows.features.get("categories")
    try:
        pairs = [json.loads(text) for text in label.names] if isinstance(label, datasets.ClassLabel) else []
        return tuple(Category(int(key), str(name)) for key, name in pairs)
    except (ValueError, TypeError):
        return ()


def class_names(rows: datasets.Dataset) -> dict[int, str]:
    """Names of a ClassLabel among the fields of objects, or those that rows of ours carry."""
    fields = rows.features["objects"]
    inner = fields.feature if isinstance(fields, datasets.List) else fields
    for key in CATEGORY_KEYS if isinstance(inner, dict) else ():
        feature = inner.get(key)
        feature = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(feature, datasets.ClassLabel):
            return dict(enumerate(feature.names))
    return {one.id: one.name for one in stored_categories(rows)}


def categories_of_all(name: str, splits: Mapping[str, datasets.Dataset]) -> tuple[Category, ...]:
    """Those that rows of ours carry, or those used in any split of rows of another's making, by id."""
    first = next(iter(splits.values()))
    if all(is_ours(rows) for rows in splits.values()):
        return stored_categories(first)
    names, used = class_names(first), set()
    for rows in splits.values():
        for row in rows.select_columns("objects"):
            found = (category_of(one) for one in _objects(row, name) if isinstance(one, Mapping))
            used |= {key for key in found if key is not None and (not names or key in names)}
    return tuple(Category(key, names.get(key, str(key))) for key in sorted(used))


def _objects(row: Mapping[str, Any], where: str) -> list[Any]:
    try:
        return listed(row["objects"], where)
    except DataError:  # which is told when the rows are read
        return []


def reader_of(name: str, split: str, rows: datasets.Dataset, categories: Iterable[Category]) -> RowReader:
    """What reads the rows of a split: those with names take any of these, others the categories given."""
    names = {} if is_ours(rows) else class_names(rows)
    return RowReader(
        f"{name}, split {split!r}", is_ours(rows), names or {category.id: category.name for category in categories}
    )


def plain(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with images as stored bytes or paths, and with the columns that we read."""
    known = ("image", "image_id", "height", "width", "objects", "categories")
    used = known if is_ours(rows) else ("image", "image_id", "objects")
    kept = rows.select_columns([key for key in used if key in rows.column_names])
    return kept.cast_column("image", datasets.Image(decode=False))


def named(rows: datasets.Dataset, categories: Iterable[Category]) -> datasets.Dataset:
    """The rows with their categories in the info, where `categories_of` finds them."""
    rows.info.description = describe_categories(tuple(categories))
    return rows


def keep(rows: datasets.Dataset, reader: RowReader, categories: Iterable[Category]) -> datasets.Dataset:
    """The rows as ours, converted where they aren't, in datasets' cache: memory doesn't grow with their number.

    Raises:
        DataError: a row can't be converted
    """
    found = tuple(categories)
    with advice_alone():
        kept = datasets.Dataset.from_generator(
            checked, features=features_of(found), gen_kwargs={"rows": rows, "reader": reader}
        )
    return named(kept, found)


def checked(rows: Iterable[Mapping[str, Any]], reader: RowReader) -> Iterator[Entry]:
    """The rows as ours, one by one.

    Raises:
        DataError: at the first that can't be used
    """
    seen: set[int] = set()
    for number, row in enumerate(rows):
        made = reader(row, number)
        if made["image_id"] in seen:
            raise DataError(reader.used_twice(made["image_id"], number))
        seen.add(made["image_id"])
        yield made
