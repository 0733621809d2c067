"""Datasets on the Hub: rows of `load_coco` uploaded by `DatasetDict.push_to_hub`, and others with image and objects
columns.

Rows of `load_coco` ("ours") are checked and used unchanged. Other rows are converted and kept in datasets' cache.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

from m2f_trainer.config.arguments import ExifFrame, PixelRange, parse_pixel_range
from m2f_trainer.data.coco_json import check_images
from m2f_trainer.data.dataset import (
    FEATURES,
    Category,
    load_coco,
    row_features,
    rows_with_validation,
    stored_categories,
    unwrap_data_errors,
    warn_held_out,
)
from m2f_trainer.data.images import image_header
from m2f_trainer.data.layouts import SPLITS, split_paths
from m2f_trainer.data.normalize import type_name
from m2f_trainer.data.objects import (
    CATEGORY_KEYS,
    MASK_KEYS,
    CategoryFields,
    category_of,
    mixed_categories,
    split_objects,
    with_one_only,
)
from m2f_trainer.data.problems import Report, raise_problem
from m2f_trainer.data.reading import ASK_FRAME, Reading, common_range, reading_of, size_in_frame, spaced
from m2f_trainer.data.splits import Entry, SplitAnnotations, pack_polygons
from m2f_trainer.errors import DataError, ImageError, mistyped_path
from m2f_trainer.masks.rle import allow_pixels, brief

_SAMPLED = 1000  # images of which it is asked whether their values have more than 8 bits
_IDS_PER_ROW = 100_000  # annotation ids that are reserved for the objects of one row


def load_dataset(
    name: str | Path,
    annotations: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    *,
    exif_frame: ExifFrame = "auto",
    pixel_range: PixelRange | Literal["auto"] = "auto",
    follow_links: bool = False,
    required: str = "",
    hold_out: bool = True,
) -> datasets.DatasetDict:
    """The rows of a dataset on this machine, or of one on the Hub (`user/name`) or its downloaded folder.

    Args:
        name: a folder or file as of `load_coco`, or `user/name`
        annotations, images: annotation file and image folder of splits as SPLIT=PATH, instead of those found
        exif_frame, pixel_range, follow_links: how images are read, as of `load_coco`
        required: a split that may not be left out, as of `load_coco`
        hold_out: use a fifth of the training images as valid split if there is none

    Raises:
        DataError: there is none, or it can't be used; the message names what is wrong and the remedy
    """
    files, folders = split_paths(annotations, "annotations"), split_paths(images, "images")
    if not is_hub_dataset(name):
        return load_coco(
            name,
            annotations=files,
            images=folders,
            hold_out=hold_out,
            exif_frame=exif_frame,
            pixel_range=pixel_range,
            follow_links=follow_links,
            required=required,
        )
    check_no_files(name, files, folders)
    return load_hub(str(name), exif_frame, pixel_range, hold_out)


def load_recipe_dataset(recipe: Mapping[str, Any]) -> datasets.DatasetDict:
    """The dataset that the fields of a recipe name, as of `load_dataset`; fields that it lacks have their defaults.

    Also sets the limit of pixels of this process to that of the recipe.
    """
    allow_pixels(recipe.get("max_pixels"))
    return load_dataset(
        str(recipe["dataset_name"]),
        recipe.get("annotations"),
        recipe.get("images"),
        exif_frame=recipe.get("exif_frame", "auto"),
        pixel_range=parse_pixel_range(str(recipe.get("pixel_range", "auto"))),
        follow_links=bool(recipe.get("follow_links")),
    )


def check_no_files(name: str | Path, *given: Mapping[str, str]) -> None:
    """Raise DataError where annotation files or image folders are given for a dataset on the Hub."""
    if any(given):
        raise DataError(
            f"{name}: --annotations and --images are for folders, and this is a Hub dataset. Leave them out."
        )


def is_hub_dataset(name: str | Path) -> bool:
    """Whether this is the name of a dataset on the Hub, or a folder of Parquet files as downloaded from there."""
    return is_hub_name(name) or any(Path(name).glob("*.parquet")) or any(Path(name).glob("data/*.parquet"))


def is_hub_name(name: str | Path) -> bool:
    """Whether this is `user/name` and not a path on this machine."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(name)) is not None and not (
        Path(name).exists() or mistyped_path(str(name))
    )


def load_hub(
    name: str,
    exif_frame: ExifFrame = "auto",
    pixel_range: PixelRange | Literal["auto"] = "auto",
    hold_out: bool = True,
    **options: Any,
) -> datasets.DatasetDict:
    """The splits of a Hub dataset as rows with embedded images; `options` go to `datasets.load_dataset`.

    Photos with an EXIF rotation need `exif_frame`, unless the rows were written by this package: these store the frame.

    Raises:
        DataError: it can't be loaded, or has no image and objects columns that describe masks
    """
    splits = _load_splits(name, **options)
    categories, kept = _all_categories(name, splits), {}
    for split, rows in splits.items():
        reader = _row_reader(name, split, rows, categories, exif_frame)
        if reader.ours:
            deque(convert_rows(rows.remove_columns("image"), reader), maxlen=0)  # only checks the rows
            kept[split] = _known_columns(rows)
        else:
            with unwrap_data_errors():
                kept[split] = datasets.Dataset.from_generator(
                    convert_rows,
                    features=row_features(categories),
                    gen_kwargs={"rows": _known_columns(rows), "reader": reader},
                )
    read = datasets.DatasetDict(_with_reading(kept, exif_frame, pixel_range))
    found = rows_with_validation(read) if hold_out else read
    if len(found) > len(kept):
        warn_held_out(name, found)
    return found


def _with_reading(
    splits: Mapping[str, datasets.Dataset], exif_frame: ExifFrame, pixel_range: PixelRange | Literal["auto"]
) -> dict[str, datasets.Dataset]:
    """The splits with the columns that say how their images are read."""
    first = splits.get("train", next(iter(splits.values())))
    known = [key for key in Reading().columns() if key in first.column_names]
    stored = reading_of(first.select_columns(known)[0] if known else {})
    if pixel_range == "auto":
        images = first.select_columns(["image"])
        deep = [number for number in spaced(len(images), _SAMPLED) if _is_deep(images[number]["image"])]
        found = common_range([partial(_image_of, images, number) for number in deep])
        pixel_range = stored.pixel_range or found
    displayed = stored.displayed if exif_frame == "auto" else exif_frame == "displayed"
    columns = Reading(displayed, pixel_range).columns()
    read = {}
    for split, rows in splits.items():
        rest = rows.remove_columns([key for key in columns if key in rows.column_names])
        for key, value in columns.items():
            rest = rest.add_column(key, [value] * len(rest), feature=FEATURES[key])
        read[split] = rest
    return read


def _image_of(rows: datasets.Dataset, number: int) -> Mapping[str, Any]:
    return dict(rows[number]["image"] or {})


def _is_deep(image: Mapping[str, Any] | None) -> bool:
    try:
        return image_header(image or {}, "image").deep
    except ImageError:  # reported when the images are checked
        return False


def read_hub(name: str, report: Report, exif_frame: ExifFrame = "auto", **options: Any) -> "dict[str, HubSplit]":
    """The splits of a Hub dataset for `m2f check`; problems of its rows are reported. Images are read when needed.

    Raises:
        DataError: it can't be loaded, or has no image and objects columns
    """
    splits = _load_splits(name, **options)
    categories, found = _all_categories(name, splits), {}
    for split, stored in splits.items():
        reader, rows = _row_reader(name, split, stored, categories, exif_frame), _known_columns(stored)
        without_images = rows.remove_columns("image") if reader.ours else rows
        found[split] = reader.read_split(without_images, rows.select_columns(["image"]), report)
    return found


def _load_splits(name: str, **options: Any) -> dict[str, datasets.Dataset]:
    """The splits under our names, each with image and objects columns."""
    try:
        loaded = datasets.load_dataset(name, **options)
    except Exception as error:
        raise DataError(
            f"{name}: expected a folder, or a dataset on the Hub that you may read, but loading it failed"
            f" ({type(error).__name__}: {error}). Check the name, the network and HF_TOKEN."
        ) from error
    splits = {SPLITS[key]: rows for key, rows in loaded.items() if key in SPLITS}
    roots = _image_roots(name)
    for split, rows in splits.items():
        if not {"image", "objects"} <= set(rows.column_names):
            raise DataError(
                f"{name}, split {split!r}: expected columns image and objects,"
                f" found {', '.join(rows.column_names) or 'none'}. Rename the columns."
            )
        _check_image_paths(f"{name}, split {split!r}", name, rows, roots)
    if not splits:
        raise DataError(f"{name}: expected splits {', '.join(SPLITS)}, found {', '.join(loaded)}. Rename the splits.")
    return splits


def _image_roots(name: str) -> tuple[Path, ...]:
    """The folders that rows may name images in: the dataset's own, and for a name on the Hub its downloads."""
    if Path(name).exists():
        return (Path(name).resolve(),)
    downloads = datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH
    repository = Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    return tuple(Path(one).resolve() for one in (repository, *downloads))


def _check_image_paths(where: str, name: str, rows: datasets.Dataset, roots: Sequence[Path]) -> None:
    """Raise DataError at a row without image bytes whose path leads out of the dataset.

    Otherwise a dataset could name any image of this machine, which would appear in pages, cards and uploads.
    """
    images = rows.select_columns("image").cast_column("image", datasets.Image(decode=False)).with_format("arrow")
    number = 0
    for table in images.iter(1000):
        for image in table["image"]:
            data, path = (image[key] for key in ("bytes", "path")) if image.is_valid else (None, None)
            if data is not None and not data.is_valid and path is not None and path.is_valid:
                real = Path(str(path)).resolve()
                if not any(real.is_relative_to(root) for root in roots):
                    raise DataError(
                        f"{where}, row {number}: expected the bytes of an image, or a path inside {name}, got {path}."
                        " Remove the row, or embed the images (`Dataset.push_to_hub` does)."
                    )
            number += 1


def is_ours(rows: datasets.Dataset) -> bool:
    """Whether rows were built by `load_coco` before they were uploaded."""
    same = all(rows.features.get(key) == FEATURES[key] for key in ("image_id", "height", "width", "objects"))
    return same and bool(stored_categories(rows))


def _known_columns(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with the columns that are read, and images as stored bytes or paths."""
    ours = ("image", "image_id", "height", "width", *Reading().columns(), "objects", "categories")
    known = ours if is_ours(rows) else ("image", "image_id", "objects")
    kept = rows.select_columns([key for key in known if key in rows.column_names])
    return kept.cast_column("image", datasets.Image(decode=False))


def _all_categories(name: str, splits: Mapping[str, datasets.Dataset]) -> tuple[Category, ...]:
    """The categories stored with rows of ours; of other rows those used in any split, by id.

    Categories that objects have by name only are numbered in the order of their names.
    """
    first = next(iter(splits.values()))
    if all(is_ours(rows) for rows in splits.values()):
        return stored_categories(first)
    names, keys = _label_names(first)
    found = {category for rows in splits.values() for category in _used_categories(rows, keys)}
    if names:
        ids = {text: key for key, text in names.items()}
        used = {number if text is None else ids.get(text) for text, number in found}
        return tuple(Category(key, names[key]) for key in sorted(names) if key in used)
    unnamed, numberless = with_one_only(found)
    if unnamed and numberless:
        raise mixed_categories(name, unnamed[0], numberless[0])
    if unnamed:
        return tuple(Category(key, str(key)) for key in sorted({key for _, key in found if key is not None}))
    return tuple(map(Category, count(1), sorted({text for text, _ in found if text is not None})))


def _used_categories(rows: datasets.Dataset, keys: Sequence[str]) -> Iterator[CategoryFields]:
    """The category of each object, from the fields `keys`."""
    for row in rows.select_columns("objects"):
        try:
            objects = split_objects(row["objects"], "")
        except DataError:  # reported when the rows are read
            continue
        yield from (category_of(one, keys) for one in objects if isinstance(one, Mapping))


def _label_names(rows: datasets.Dataset) -> tuple[dict[int, str], Sequence[str]]:
    """The names of categories by number, and the fields of an object that may hold its category.

    A ClassLabel among these fields has names, which are of its own numbers only: where there is one, no other field is
    read. Otherwise names are those that are stored with rows of ours, or there are none.
    """
    fields = rows.features["objects"]
    inner = fields.feature if isinstance(fields, datasets.List) else fields
    for key in CATEGORY_KEYS if isinstance(inner, dict) else ():
        feature = inner.get(key)
        feature = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(feature, datasets.ClassLabel):
            return dict(enumerate(feature.names)), (key,)
    stored = {one.id: one.name for one in stored_categories(rows)}
    return stored, ("category_id",) if stored and "category_id" in inner else CATEGORY_KEYS


def _row_reader(
    name: str, split: str, rows: datasets.Dataset, categories: Iterable[Category], exif_frame: ExifFrame
) -> "RowReader":
    """The reader of a split, whose objects may have any class that its features name, or else `categories`."""
    ours = is_ours(rows)
    names, keys = _label_names(rows)
    if ours or not names:
        names = {category.id: category.name for category in categories}
    ids = {text: key for key, text in names.items()}
    return RowReader(f"{name}, split {split!r}", ours, names, ids, keys, exif_frame)


def convert_rows(rows: Iterable[Mapping[str, Any]], reader: "RowReader") -> Iterator[Entry]:
    """The rows as ours, one by one.

    Raises:
        DataError: at the first row that can't be used, naming row, object and remedy
    """
    seen: set[int] = set()
    for number, row in enumerate(rows):
        converted = reader.convert(row, number)
        if converted["image_id"] in seen:
            raise DataError(reader.repeated_id_message(converted["image_id"], number))
        seen.add(converted["image_id"])
        yield converted


class StoredRows(Protocol):
    """Rows that can be read by index."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class HubSplit(SplitAnnotations):
    """The annotations of one split of the Hub; images are read from the stored rows when they are needed."""

    ours: bool
    stored: StoredRows
    row_of_image: Mapping[int, int]

    def source(self, image: Entry) -> Entry:
        """The image's data, mostly as bytes in its row."""
        return dict(self.stored[self.row_of_image[image["id"]]].get("image") or {})

    def annotation_name(self, entry: Entry, image: Entry) -> str:
        """An object in messages: its id, or its row and index if the dataset has no ids."""
        if self.ours:
            return f"annotation {entry['id']} of image {image['id']}"
        row, index = divmod(entry["id"] - 1, _IDS_PER_ROW)
        return f"row {row}, object {index}"


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one split as COCO entries.

    Attributes:
        name: dataset and split in messages
        ours: whether the rows were built by `load_coco`
        categories: names by id of the categories that objects may have
        ids: the ids of those that objects may have by name
        keys: the fields of an object that may hold its category
        exif_frame: the frame of the annotations of rows that aren't ours
    """

    name: str
    ours: bool
    categories: Mapping[int, str]
    ids: Mapping[str, int]
    keys: Sequence[str]
    exif_frame: ExifFrame = "auto"

    def convert(self, row: Mapping[str, Any], number: int) -> Entry:
        """The row as one of ours.

        Raises:
            DataError: at the first problem, naming row, object and remedy
        """
        entries = self.read(row, number, raise_problem)
        if entries and entries[1] and self.exif_frame == "auto" and not self.ours:
            where = f"{self.name}, row {number}"
            if image_header(row["image"], where).orientation != 1:  # 5 to 8 are reported with the size
                raise_problem("exif-frame", self.name, [number], f"{where}: {ASK_FRAME}")
        split = self._split([entries] if entries else [], [row], {entries[0]["id"]: 0} if entries else {})
        converted = next(split.rows())
        return dict(row) if self.ours else {**converted, "categories": None}

    def read_split(self, rows: Iterable[Mapping[str, Any]], stored: StoredRows, report: Report) -> HubSplit:
        """All rows; problems of a row are reported here, problems of a mask when its object is built."""
        found: dict[int, tuple[Entry, list[Entry]]] = {}
        row_of_image: dict[int, int] = {}
        for number, row in enumerate(rows):
            entries = self.read(row, number, report)
            if entries is None:
                continue
            image_id = entries[0]["id"]
            if image_id in found:
                message = self.repeated_id_message(image_id, number)
                report("duplicate-image-id", self.name, [image_id], message, image_id)
                continue
            found[image_id] = (entries[0], [pack_polygons(one) for one in entries[1]])
            row_of_image[image_id] = number
        return self._split(list(found.values()), stored, row_of_image)

    def repeated_id_message(self, image_id: int, number: int) -> str:
        """The message for an image id that an earlier row has."""
        return f"{self.name}, row {number}: image_id {image_id} is used twice. Renumber the images."

    def _split(
        self, found: list[tuple[Entry, list[Entry]]], stored: StoredRows, row_of_image: Mapping[int, int]
    ) -> HubSplit:
        images = tuple(image for image, _ in found)
        annotations = {image["id"]: entries for image, entries in found}
        return HubSplit(self.name, images, annotations, self.categories, self.ours, stored, row_of_image)

    def read(self, row: Mapping[str, Any], number: int, report: Report) -> tuple[Entry, list[Entry]] | None:
        """The image and its annotations as COCO entries; None for a row without a usable image."""
        image = self._image(row, number, report)
        if image is None:
            return None
        try:
            objects = split_objects(row["objects"], f"{self.name}, row {number}")
        except DataError as error:
            report("bad-annotation-entry", self.name, [image["id"]], str(error), image["id"])
            objects = []
        entries = (self._annotation(one, image, number, index, report) for index, one in enumerate(objects))
        return image, [entry for entry in entries if entry is not None]

    def _image(self, row: Mapping[str, Any], number: int, report: Report) -> Entry | None:
        image_id = row.get("image_id")
        if self.ours:
            height, width = row["height"], row["width"]
        else:
            image_id = image_id if type(image_id) is int else number
            try:
                where = f"{self.name}, row {number}"
                height, width = size_in_frame(row["image"] or {}, where, self.exif_frame, self.name, report)
            except ImageError as error:
                report("bad-image", self.name, [image_id], str(error))
                return None
        image = {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
        valid = check_images([image], self.name, report)
        return valid[0] if valid else None

    def _annotation(self, one: Any, image: Entry, number: int, index: int, report: Report) -> Entry | None:
        """An object as a COCO annotation; None where it has no usable category or crowd flag."""
        own_id = number * _IDS_PER_ROW + index + 1
        kind, problem = self._object_problem(one)
        if problem:
            message = f"{self.name}, row {number}, object {index}: {problem}"
            report(kind, self.name, [own_id], message, image["id"])
            return None
        mask = next((one[key] for key in MASK_KEYS if one.get(key) is not None), None)
        if isinstance(mask, str):
            mask = {"size": [image["height"], image["width"]], "counts": mask}
        return {
            "id": one["id"] if self.ours else own_id,
            "image_id": image["id"],
            "category_id": self._category_of(one),
            "segmentation": mask,
            "bbox": one.get("bbox"),
            "area": one.get("area"),
            "iscrowd": int(one.get("iscrowd") or 0),
        }

    def _category_of(self, one: Mapping[str, Any]) -> int | str | None:
        """The id of an object's category; a name without an id as it is."""
        name, number = category_of(one, self.keys)
        if name is not None and name in self.ids:
            return self.ids[name]
        return name if number is None else number

    def _object_problem(self, one: Any) -> tuple[str, str]:
        """The kind of problem and its message, "" for none."""
        if not isinstance(one, Mapping):
            return "bad-annotation-entry", f"expected an object, got a {type_name(one)}. Remove it."
        missing = [key for key in ("id", "bbox", "area", "iscrowd", "counts") if self.ours and one.get(key) is None]
        if missing:
            problem = f"expected a value for {', '.join(missing)}, got null. Upload the dataset again."
            return "bad-annotation-entry", problem
        category = self._category_of(one)
        if category is None:
            found = ", ".join(f"{key} {brief(one[key])}" for key in self.keys if key in one) or sorted(one)
            return "bad-annotation-entry", f"expected a whole number or a name as category, got {found}. Add one."
        if category not in self.categories:
            known = ", ".join(map(str, sorted(self.ids if isinstance(category, str) else self.categories)[:10]))
            return (
                "unknown-category",
                f"category {brief(category)} isn't one of the named ones: {known}. Correct or remove it.",
            )
        if one.get("iscrowd") not in (None, 0, 1):
            return "bad-crowd", f"expected an `iscrowd` of 0 or 1, got {brief(one['iscrowd'])}. Correct it."
        return "", ""
