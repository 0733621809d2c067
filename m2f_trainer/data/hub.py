"""Datasets on the Hub: ours, as `DatasetDict.push_to_hub` leaves them, and others with image and objects columns."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from m2f_trainer.data import masks, rle
from m2f_trainer.data.annotations import AnnotationFile
from m2f_trainer.data.coco import Category, categories_of, describe_categories, features_of, load_coco
from m2f_trainer.data.entries import Entry
from m2f_trainer.data.images import image_size
from m2f_trainer.data.layouts import SPLITS
from m2f_trainer.errors import DataError

_CATEGORY_KEYS = ("category_id", "category", "categories", "label", "labels", "class")
_MASK_KEYS = ("segmentation", "segmentations", "segments", "polygons", "counts")


def load_dataset(name: str | Path) -> datasets.DatasetDict:
    """The rows of a COCO or YOLO folder, or of a dataset on the Hub (`user/name`).

    Raises:
        DataError: there is none, or it can't be used; the message names what and the remedy
    """
    return load_hub(str(name)) if is_hub_name(name) else load_coco(name)


def is_hub_name(name: str | Path) -> bool:
    """Whether this is `user/name` and no path of this machine."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(name)) is not None and not Path(name).exists()


def load_hub(name: str, **options: Any) -> datasets.DatasetDict:
    """The splits of a Hub dataset as rows, images embedded; `options` go to `datasets.load_dataset`.

    Raises:
        DataError: it can't be loaded, or has no image and objects columns that describe masks
    """
    try:
        loaded = datasets.load_dataset(name, **options)
    except Exception as error:
        raise DataError(
            f"{name}: expected a folder, or a dataset on the Hub that you may read, but loading it failed"
            f" ({type(error).__name__}: {error}). Check the name, the network and HF_TOKEN."
        ) from error
    splits = {SPLITS[key]: rows for key, rows in loaded.items() if key in SPLITS}
    for split, rows in splits.items():
        if not {"image", "objects"} <= set(rows.column_names):
            raise DataError(
                f"{name}, split {split!r}: expected columns image and objects, found {', '.join(rows.column_names)}."
                " Rename the columns."
            )
    if not splits:
        raise DataError(f"{name}: expected splits {', '.join(SPLITS)}, found {', '.join(loaded)}. Rename the splits.")
    return _ours(splits) if all(is_ours(rows) for rows in splits.values()) else _converted(name, splits)


def is_ours(rows: datasets.Dataset) -> bool:
    """Whether rows were built by `load_coco` before they were uploaded."""
    return "categories" in rows.features and isinstance(rows.features["categories"], datasets.ClassLabel)


def _ours(splits: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    """The rows as they were, with their categories back in the info."""
    for rows in splits.values():
        pairs = map(json.loads, rows.features["categories"].names)
        rows.info.description = describe_categories([Category(int(key), str(name)) for key, name in pairs])
    return datasets.DatasetDict(
        {split: rows.cast_column("image", datasets.Image(decode=False)) for split, rows in splits.items()}
    )


def _converted(name: str, splits: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    """Rows of ours from columns image and objects of another's making."""
    plain = {split: rows.cast_column("image", datasets.Image(decode=False)) for split, rows in splits.items()}
    names = _class_names(next(iter(splits.values())))
    found = {}
    used: set[int] = set()
    for split, rows in plain.items():
        converted = [_row(row, k, f"{name}, split {split!r}") for k, row in enumerate(rows.select_columns(_used(rows)))]
        used |= {one["category_id"] for row in converted for one in row["objects"]}
        found[split] = converted
    categories = [Category(key, names.get(key, str(key))) for key in sorted(used)]
    features = features_of(categories)
    info = datasets.DatasetInfo(description=describe_categories(categories), features=features)
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=features, info=info) for split, rows in found.items()}
    )


def _used(rows: datasets.Dataset) -> list[str]:
    return [key for key in ("image", "image_id", "objects") if key in rows.column_names]


def _class_names(rows: datasets.Dataset) -> dict[int, str]:
    """Names of a ClassLabel among the fields of objects."""
    fields = rows.features["objects"]
    inner = fields.feature if isinstance(fields, datasets.List) else fields
    for key in _CATEGORY_KEYS if isinstance(inner, dict) else ():
        feature = inner.get(key)
        feature = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(feature, datasets.ClassLabel):
            return dict(enumerate(feature.names))
    return {}


def _row(row: Mapping[str, Any], number: int, where: str) -> Entry:
    where = f"{where}, row {number}"
    height, width = image_size(row["image"], where)
    objects = [_object(one, k, height, width, f"{where}, object {k}") for k, one in enumerate(_listed(row["objects"]))]
    numbered = [{**one, "id": one["id"] or number * 100_000 + k + 1} for k, one in enumerate(objects)]
    size = {"height": height, "width": width}
    return {
        "image": row["image"],
        "image_id": row.get("image_id", number),
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


def _object(one: Mapping[str, Any], number: int, height: int, width: int, where: str) -> Entry:
    category = next((one[key] for key in _CATEGORY_KEYS if type(one.get(key)) is int), None)
    mask = next((one[key] for key in _MASK_KEYS if one.get(key) is not None), None)
    if category is None:
        raise DataError(f"{where}: expected a whole number as category, got {sorted(one)}. Add category_id.")
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
