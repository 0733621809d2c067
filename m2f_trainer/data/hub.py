"""Datasets on the Hub: ours, as `DatasetDict.push_to_hub` leaves them, and others with image and objects columns."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import datasets

from m2f_trainer.data.coco import FEATURES, Category, advice_alone, describe_categories, features_of, load_coco
from m2f_trainer.data.entries import Entry
from m2f_trainer.data.findings import Report
from m2f_trainer.data.holdout import rows_with_validation, warn
from m2f_trainer.data.hub_rows import CATEGORY_KEYS, HubSplit, RowReader, category_of, listed
from m2f_trainer.data.layouts import SPLITS
from m2f_trainer.errors import DataError

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

    Raises:
        DataError: it can't be loaded, or has no image and objects columns
    """
    return read_rows(name, usable_splits(name, lambda: datasets.load_dataset(name, **options)), report)


def read_rows(name: str, splits: Mapping[str, datasets.Dataset], report: Report) -> dict[str, HubSplit]:
    """The same for rows at hand. Images are read where needed, and not kept."""
    known, found = categories_of_all(name, splits), {}
    for split, stored in splits.items():
        reader, rows = reader_of(name, split, stored, known), plain(stored)
        light = rows.remove_columns("image") if reader.ours else rows
        found[split] = reader.split(light, rows.select_columns(["image"]), report)
    return found


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
    same = all(rows.features.get(key) == FEATURES[key] for key in ("image_id", "height", "width", "objects"))
    return same and bool(stored_categories(rows))


def stored_categories(rows: Rows) -> tuple[Category, ...]:
    """The categories that rows of ours carry in their features, none for those of another's making."""
    label = rows.features.get("categories")
    try:
        pairs = [json.loads(text) for text in label.names] if isinstance(label, datasets.ClassLabel) else []
        return tuple(Category(int(key), str(name)) for key, name in pairs)
    except (ValueError, TypeError):
        return ()


def class_names(rows: Rows) -> dict[int, str]:
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


def reader_of(name: str, split: str, rows: Rows, categories: Iterable[Category]) -> RowReader:
    """What reads the rows of a split: those with names take any of these, others the categories given."""
    names = {} if is_ours(rows) else class_names(rows)
    return RowReader(
        f"{name}, split {split!r}", is_ours(rows), names or {category.id: category.name for category in categories}
    )


def plain(rows: AnyRows) -> AnyRows:
    """The rows with images as stored bytes or paths, and with the columns that we read."""
    known = ("image", "image_id", "height", "width", "objects", "categories")
    used = known if is_ours(rows) else ("image", "image_id", "objects")
    kept: AnyRows = rows.select_columns([key for key in used if key in rows.column_names])
    stored: AnyRows = kept.cast_column("image", datasets.Image(decode=False))
    return stored


def named(rows: datasets.Dataset, categories: Iterable[Category]) -> datasets.Dataset:
    """The rows with their categories in the info, where `categories_of` finds them."""
    rows.info.description = describe_categories(tuple(categories))
    return rows


def keep(rows: Rows, reader: RowReader, categories: Iterable[Category], **source: str) -> datasets.Dataset:
    """The rows as ours, converted where they aren't, in datasets' cache: memory doesn't grow with their number.

    `source` tells contents apart for which the rows themselves look the same, such as those of a stream.

    Raises:
        DataError: a row can't be converted
    """
    found = tuple(categories)
    with advice_alone():
        kept = datasets.Dataset.from_generator(
            checked, features=features_of(found), gen_kwargs={"rows": rows, "reader": reader, **source}
        )
    return named(kept, found)


def checked(rows: Iterable[Mapping[str, Any]], reader: RowReader, **source: str) -> Iterator[Entry]:
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
