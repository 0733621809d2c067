"""Hub datasets opened without downloading them: for training as streams, for the doctor their first images."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from m2f_trainer.data.dataset import Category, advice_alone, features_of
from m2f_trainer.data.hub_dataset import (
    HubSplit,
    class_names,
    is_hub_set,
    is_ours,
    keep,
    named,
    plain,
    read_rows,
    reader_of,
    stored_categories,
    usable_splits,
)
from m2f_trainer.data.images import open_image
from m2f_trainer.data.problems import Report
from m2f_trainer.data.transforms import describe
from m2f_trainer.errors import DataError

logger = logging.getLogger(__name__)
_CHECKED = 32  # images that are looked at before training starts

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Stream:
    """A training split that is read as it comes, and what is known of it before."""

    name: str
    rows: datasets.IterableDataset
    categories: tuple[Category, ...]
    convert: Callable[[Row, int], Row]
    version: str  # tells contents of one name apart
    first: datasets.Dataset  # its first images, which have been checked

    def take(self, limit: int) -> "Stream":
        """`limit` images, the first ones of each file."""
        return replace(self, rows=self.rows.take(limit))


def load_stream(name: str) -> tuple[Stream, datasets.DatasetDict]:
    """The training split of a Hub dataset as a stream, and the others as rows, read once and kept in datasets' cache.

    Its first images are checked; `m2f check` reads them all, or as many as it is told to.

    Raises:
        DataError: a COCO folder, or a dataset that can't be used or doesn't name its classes
    """
    return open_stream(_streamed(name))


def open_stream(name: str, **options: Any) -> tuple[Stream, datasets.DatasetDict]:
    """The same for all that datasets can load; `options` go to its `load_dataset`."""
    splits, version = _splits(name, **options)
    if "train" not in splits:
        raise DataError(f"{name}: expected a split 'train', found {', '.join(splits)}. Name the training split so.")
    categories = declared_categories(name, splits["train"])
    others = {
        split: keep(plain(rows), reader_of(name, split, rows, categories), categories, version=version)
        for split, rows in splits.items()
        if split != "train"
    }
    rows, reader = plain(splits["train"]), reader_of(name, "train", splits["train"], categories)
    first = first_rows((reader(row, k) for k, row in enumerate(rows.take(_CHECKED))), reader.where, categories)
    logger.warning("%s is streamed: its first %d training images were checked; `m2f check` reads all", name, len(first))
    convert = _unchanged if reader.ours else reader
    return Stream(name, rows, categories, convert, version, first), datasets.DatasetDict(others)


def read_stream(name: str, limit: int, report: Report) -> dict[str, HubSplit]:
    """The first `limit` images of each split as the doctor reads them; these are kept in datasets' cache.

    Raises:
        DataError: what `load_stream` refuses before it reads a row
    """
    splits, version = _splits(_streamed(name))
    declared_categories(name, next(iter(splits.values())))
    kept = {}
    for split, rows in splits.items():
        found = plain(rows)
        with advice_alone():
            kept[split] = datasets.Dataset.from_generator(
                _first, features=found.features, gen_kwargs={"rows": found, "limit": limit, "version": version}
            )
    return read_rows(name, kept, report)


def _first(rows: datasets.IterableDataset, limit: int, version: str) -> Iterator[Row]:
    yield from rows.take(limit)


def _streamed(name: str) -> str:
    if not is_hub_set(name):
        raise DataError(
            f"{name}: expected a dataset on the Hub (user/name) or its downloaded folder, as streaming is asked for."
            " Leave streaming out: of a COCO or YOLO folder, only the images in use are in memory anyway."
        )
    return name


def _splits(name: str, **options: Any) -> tuple[dict[str, datasets.IterableDataset], str]:
    """The splits as streams, and what tells contents of one name apart."""
    builder: list[Any] = []

    def load() -> Mapping[str, datasets.IterableDataset]:
        builder.append(datasets.load_dataset_builder(name, **options))
        return dict(builder[0].as_streaming_dataset())  # as `load_dataset(..., streaming=True)` ends

    splits = usable_splits(name, load)
    return splits, "/".join(Path(builder[0].cache_dir).parts[-4:])  # name, configuration, a hash of the files' versions


def declared_categories(name: str, rows: datasets.IterableDataset) -> tuple[Category, ...]:
    """All categories that the features name: which of them are used would show after reading everything."""
    if is_ours(rows):
        return stored_categories(rows)
    names = class_names(rows)
    if not names:
        raise DataError(
            f"{name}: expected a ClassLabel with the names of the classes in objects, as streaming is true and the"
            " classes must be known at the start. Leave streaming out, or push the dataset with a ClassLabel."
        )
    return tuple(Category(key, text) for key, text in names.items())


def _unchanged(row: Row, number: int) -> Row:
    return row


def first_rows(rows: Iterable[Row], where: str, categories: Sequence[Category]) -> datasets.Dataset:
    """The first rows of a stream, looked at as `m2f check` would at all.

    Raises:
        DataError: there is none, or one can't be used
    """
    found = list(rows)
    if not found:
        raise DataError(f"{where}: expected images, found none. Add images.")
    for row in found:
        open_image(row["image"], describe(row), size=(row["height"], row["width"]))
    return named(datasets.Dataset.from_list(found, features=features_of(categories)), categories)
