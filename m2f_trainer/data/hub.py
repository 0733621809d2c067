"""Datasets on the Hub: ours, as `DatasetDict.push_to_hub` leaves them, and others with image and objects columns."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import datasets

from m2f_trainer.data import masks, rle
from m2f_trainer.data.annotations import AnnotationFile
from m2f_trainer.data.coco import (
    Category,
    advice_alone,
    categories_of,
    describe_categories,
    features_of,
    load_coco,
)
from m2f_trainer.data.entries import Entry
from m2f_trainer.data.images import image_size
from m2f_trainer.data.layouts import SPLITS
from m2f_trainer.errors import DataError

_CATEGORY_KEYS = ("category_id", "category", "categories", "label", "labels", "class")
_MASK_KEYS = ("segmentation", "segmentations", "segments", "polygons", "counts")


Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
AnyRows = TypeVar("AnyRows", bound=Rows)


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
    if all(is_ours(rows) for rows in splits.values()):
        categories = stored_categories(next(iter(splits.values())))
        for split, rows in splits.items():
            check_masks(rows.remove_columns("image"), f"{name}, split {split!r}")
        return datasets.DatasetDict({split: named(plain(rows), categories) for split, rows in splits.items()})
    return _converted(name, splits)


def usable_splits(name: str, load: Callable[[], Mapping[str, AnyRows]]) -> dict[str, AnyRows]:
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
        columns = rows.column_names or []
        if not {"image", "objects"} <= set(columns):
            raise DataError(
                f"{name}, split {split!r}: expected columns image and objects, found {', '.join(columns) or 'none'}."
                " Rename the columns."
            )
    if not splits:
        raise DataError(f"{name}: expected splits {', '.join(SPLITS)}, found {', '.join(loaded)}. Rename the splits.")
    return splits


def is_ours(rows: Rows) -> bool:
    """Whether rows were built by `load_coco` before they were uploaded."""
    return "categories" in rows.features and isinstance(rows.features["categories"], datasets.ClassLabel)


def stored_categories(rows: Rows) -> tuple[Category, ...]:
    """The categories that rows of ours carry in their features."""
    pairs = map(json.loads, rows.features["categories"].names)
    return tuple(Category(int(key), str(name)) for key, name in pairs)


def plain(rows: AnyRows) -> AnyRows:
    """The rows with images as stored bytes or paths, and with the columns that we read."""
    known = ("image", "image_id", "height", "width", "objects", "categories")
    used = known if is_ours(rows) else ("image", "image_id", "objects")
    kept: AnyRows = rows.select_columns([key for key in used if key in rows.column_names])
    stored: AnyRows = kept.cast_column("image", datasets.Image(decode=False))
    return stored


def check_masks(rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """What is on the Hub may have been changed since it was built, and its masks go to C code.

    Raises:
        MaskError: a mask doesn't fill its image
    """
    for row in rows:
        for one in row["objects"]:
            place = f"{where}, image {row['image_id']}, annotation {one['id']}"
            rle.read_runs(one["counts"], row["height"], row["width"], place)


def named(rows: datasets.Dataset, categories: Iterable[Category]) -> datasets.Dataset:
    """The rows with their categories in the info, where `categories_of` finds them."""
    rows.info.description = describe_categories(tuple(categories))
    return rows


def _converted(name: str, splits: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    """Rows of ours from columns image and objects of another's making."""
    names = class_names(next(iter(splits.values())))
    used: set[int] = set()
    for split, rows in splits.items():
        for k, row in enumerate(rows.select_columns("objects")):
            used |= {_category(one, f"{name}, split {split!r}, row {k}") for one in _listed(row["objects"])}
    categories = [Category(key, names.get(key, str(key))) for key in sorted(used)]
    kept = {split: keep(plain(rows), f"{name}, split {split!r}", categories) for split, rows in splits.items()}
    return datasets.DatasetDict(kept)


def keep(rows: Rows, where: str, categories: Iterable[Category], **source: str) -> datasets.Dataset:
    """The rows as ours, converted where they aren't, in datasets' cache: memory doesn't grow with their number.

    `source` tells contents apart for which the rows themselves look the same, such as those of a stream.

    Raises:
        DataError: a row can't be converted
    """
    found = tuple(categories)
    with advice_alone():
        kept = datasets.Dataset.from_generator(
            _rows, features=features_of(found), gen_kwargs={"rows": rows, "where": where, **source}
        )
    return named(kept, found)


def _rows(rows: Rows, where: str, **source: str) -> Iterator[Entry]:
    seen: set[int] = set()
    for number, row in enumerate(rows):
        made = row if "categories" in row else convert(row, number, where)
        if made["image_id"] in seen:
            raise DataError(f"{where}, row {number}: image_id {made['image_id']} is used twice. Renumber the images.")
        seen.add(made["image_id"])
        yield made


def class_names(rows: Rows) -> dict[int, str]:
    """Names of a ClassLabel among the fields of objects."""
    fields = rows.features["objects"]
    inner = fields.feature if isinstance(fields, datasets.List) else fields
    for key in _CATEGORY_KEYS if isinstance(inner, dict) else ():
        feature = inner.get(key)
        feature = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(feature, datasets.ClassLabel):
            return dict(enumerate(feature.names))
    return {}


def convert(row: Mapping[str, Any], number: int, where: str) -> Entry:
    """A row of ours from a `plain` one of another's making. Raises DataError where it can't be."""
    where = f"{where}, row {number}"
    height, width = image_size(row["image"], where)
    objects = [_object(one, height, width, f"{where}, object {k}") for k, one in enumerate(_listed(row["objects"]))]
    numbered = [{**one, "id": one["id"] or number * 100_000 + k + 1} for k, one in enumerate(objects)]
    size, given = {"height": height, "width": width}, row.get("image_id")
    return {
        "image": row["image"],
        "image_id": given if type(given) is int else number,
        **size,
        "objects": numbered,
        "categories": None,
    }


def _listed(objects: Any) -> Iterator[Mapping[str, Any]]:
    """Objects one by one, from a list of objects or an object of lists."""
    if isinstance(objects, Mapping):
        lists = {key: value for key, value in objects.items() if isinstance(value, list)}
        yield from (dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True))
    else:
        yield from objects


def _category(one: Mapping[str, Any], where: str) -> int:
    found = next((one[key] for key in _CATEGORY_KEYS if type(one.get(key)) is int), None)
    if found is None:
        raise DataError(f"{where}: expected a whole number as category, got {sorted(one)}. Add category_id.")
    return int(found)


def _object(one: Mapping[str, Any], height: int, width: int, where: str) -> Entry:
    category = _category(one, where)
    mask = next((one[key] for key in _MASK_KEYS if one.get(key) is not None), None)
    if isinstance(mask, str):
        mask = {"size": [height, width], "counts": mask}
    counts = masks.to_counts(mask, height, width, where)
    runs = rle.read_runs(counts, height, width)
    x0, y0, x1, y1 = rle.box_of(runs, height)
    box, area = one.get("bbox") or [x0, y0, x1 - x0, y1 - y0], one.get("area")
    return {
        "id": one.get("id"),
        "category_id": category,
        "bbox": [float(value) for value in box],
        "area": float(rle.area(runs) if area is None else area),
        "iscrowd": bool(one.get("iscrowd")),
        "counts": counts,
    }


# for the doctor


class _Sources(Mapping[int, Entry]):
    """Image id -> its data, read from the rows when it is looked at."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self._rows = rows.select_columns(["image"])
        self._places = {int(key): k for k, key in enumerate(rows["image_id"])}

    def __getitem__(self, key: int) -> Entry:
        return dict(self._rows[self._places[key]]["image"])

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def annotation_file(name: str, split: str, rows: datasets.Dataset) -> AnnotationFile:
    """Rows as the doctor reads a split."""
    images, groups = [], {}
    for row in rows.remove_columns("image"):
        size, number = (row["height"], row["width"]), row["image_id"]
        images.append({"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]})
        groups[number] = [
            {**one, "iscrowd": int(one["iscrowd"]), "segmentation": {"size": list(size), "counts": one["counts"]}}
            for one in row["objects"]
        ]
    names = {category.id: category.name for category in categories_of(rows)}
    return AnnotationFile(Path(name, split), Path(name), tuple(images), groups, names, _Sources(rows))
