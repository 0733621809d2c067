"""A dataset folder as a typed, memory-mapped `datasets.DatasetDict`, rebuilt only when its files change.

A row is one image: `image` {path, bytes}, `image_id`, `height`, `width` (original frame), `displayed` and `pixel_range`
(how it is read, see `Reading`), and `objects`, one per annotation: `id`, `category_id` (the annotation file's own),
`bbox`, `area`, `iscrowd`, `counts` (compressed COCO RLE).
The used categories are part of the features: the names of a `ClassLabel` column called `categories`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Value
from datasets.exceptions import DatasetGenerationError

from m2f_trainer.config.arguments import ExifFrame, PixelRange
from m2f_trainer.data.categories import Annotations, match_categories
from m2f_trainer.data.formats import Layout, contents, find_splits, read_optional, read_split
from m2f_trainer.data.layouts import SplitFiles
from m2f_trainer.data.problems import KINDS, Report, TrainingReport, raise_problem
from m2f_trainer.data.reading import find_reading
from m2f_trainer.data.splits import Entry, SplitAnnotations
from m2f_trainer.errors import DataError

logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "image_id": Value("int64"),
        "height": Value("int32"),
        "width": Value("int32"),
        "displayed": Value("bool"),
        "pixel_range": datasets.List(Value("float64")),
        "objects": datasets.List(
            {
                "id": Value("int64"),
                "category_id": Value("int64"),
                "bbox": datasets.List(Value("float64"), length=4),
                "area": Value("float64"),
                "iscrowd": Value("bool"),
                "counts": Value("string"),
            }
        ),
    }
)
_ROWS_PER_TABLE, _BYTES_PER_TABLE = 1000, 2**27
_ROW_FORMAT = "7"  # raise it when rows change, so that caches of older versions are not used
_HELD_OUT = 5  # one image of this many is held out for validation


# rows and their categories


@dataclass(frozen=True)
class Category:
    """One used category; `id` is the annotation file's own."""

    id: int
    name: str


def row_features(categories: Sequence[Category]) -> datasets.Features:
    """The features of a row with its categories.

    The column `categories` is always null. Its `ClassLabel` holds each category as the JSON text [id, name], because
    names alone need not be unique, and because features are all that `push_to_hub` keeps of a dataset's description.
    """
    names = [json.dumps([category.id, category.name], ensure_ascii=False) for category in categories]
    return datasets.Features({**FEATURES, "categories": datasets.ClassLabel(names=names)})


def stored_categories(rows: datasets.Dataset) -> tuple[Category, ...]:
    """The categories in the features of rows, the inverse of `row_features`; none where the rows aren't ours."""
    label = rows.features.get("categories")
    try:
        pairs = [json.loads(text) for text in label.names] if isinstance(label, datasets.ClassLabel) else []
        return tuple(Category(int(key), str(name)) for key, name in pairs)
    except (ValueError, TypeError):
        return ()


def categories_of(rows: datasets.Dataset) -> tuple[Category, ...]:
    """The categories used in any split of the dataset, by id: class k of a model is the k-th.

    Raises:
        DataError: the rows weren't built by `load_coco` or `load_dataset`
    """
    categories = stored_categories(rows)
    if not categories:
        raise DataError(
            "expected a dataset with a ClassLabel `categories` among its features, as `load_coco` builds it, found"
            f" {', '.join(rows.features) or 'no features'}. Build the dataset with `load_coco`."
        )
    return categories


# building the rows of a folder


def load_coco(
    root: str | Path,
    *,
    cache_dir: str | Path | None = None,
    annotations: Mapping[str, str | Path] | None = None,
    images: Mapping[str, str | Path] | None = None,
    hold_out: bool | None = None,
    exif_frame: ExifFrame = "auto",
    pixel_range: PixelRange | Literal["auto"] = "auto",
    follow_links: bool = False,
    required: str = "",
) -> datasets.DatasetDict:
    """The splits of a dataset on this machine, under the names train, valid and test.

    Logs once which files and folders the splits are read from.

    Args:
        root: a folder in one of the formats of `m2f_trainer.data.formats`, an annotation file or a data.yaml
        cache_dir: where the rows are cached; datasets' own cache by default
        annotations, images: annotation file and image folder by split, relative to `root`, instead of those found
        hold_out: use a fifth of the training images as valid split if there is none, as training does; default: true
            unless `annotations` are given
        exif_frame: the frame of annotations whose sizes don't say it; an error where it is needed and "auto"
        pixel_range: for images of more than 8 bits; "auto": that of the training images
        follow_links: whether images may be links to files outside of the dataset folder
        required: "test" where that split may not be left out, as it is where it has no images or masks

    Raises:
        DataError: the folder or its annotations can't be used; the message names file, id and remedy
    """
    layout = find_splits(root, annotations, images, exif_frame, follow_links)
    hold_out = not annotations if hold_out is None else hold_out
    hold_out = hold_out and lacks_validation({files.split: files for files in layout.splits})
    builder = CocoBuilder(
        cache_dir=writable_cache(cache_dir),
        dataset_name="coco",
        config_id=_cache_name(root),
        hash=_fingerprint(layout.splits, f"{hold_out} {exif_frame} {pixel_range} {follow_links}"),
        layout=layout.splits,
        hold_out=hold_out,
        exif_frame=exif_frame,
        pixel_range=pixel_range,
    )
    with unwrap_data_errors():
        builder.download_and_prepare()
    _log_findings(builder.report)
    splits = builder.as_dataset()
    for files in layout.splits:
        if files.split == required and required not in splits:
            read_split(files)  # raises the reason
    layout = layout.without({files.split for files in layout.splits}.difference(splits))
    log_once(describe_files(layout, splits))
    if len(splits) > len(layout.splits):
        warn_held_out(root, splits)
    return splits


def writable_cache(cache_dir: str | Path | None) -> str:
    """Create and return the folder that rows are cached in: `cache_dir`, or datasets' own.

    Raises:
        DataError: it can't be written
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        problem = str(error)
    if problem:
        raise DataError(
            f"{folder}: the rows of a dataset are cached there, but it can't be written ({problem}). Set the"
            " environment variable HF_DATASETS_CACHE, or HF_HOME for all caches of Hugging Face, to a folder that can"
            " be written."
        )
    return str(folder)


def describe_files(layout: Layout, splits: Mapping[str, datasets.Dataset]) -> str:
    """Text for the user: the files and folders that the splits were read from, and those that are not used."""
    folders = {}
    for name, rows in splits.items():
        paths = pc.struct_field(rows.data["image"], "path").to_pylist()
        folders[name] = {Path(folder) for folder in {os.path.dirname(path) for path in paths}}  # noqa: PTH120
    return layout.describe(folders)


def _log_findings(report: TrainingReport) -> None:
    """One line for each kind of warning and note; rows from the cache have none."""
    for finding in report.sorted():
        title = KINDS[finding.kind].title
        logger.warning("%s: %s (%d), the first: %s", finding.file, title, finding.count, finding.message)


@cache
def log_once(text: str) -> None:
    """Log a text the first time that it occurs in this process, on the main rank."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", text)


def _cache_name(root: str | Path) -> str:
    """A folder name in the cache that shows which dataset it belongs to."""
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(root).resolve().name)
    return name[:40] or "coco"


def _fingerprint(layout: tuple[SplitFiles, ...], settings: str) -> str:
    """A hash of everything that the rows depend on: annotation contents, paths of annotations, states of images."""
    digest = hashlib.sha256(f"{_ROW_FORMAT} {settings}".encode())
    for files in layout:
        paths = [
            files.split,
            files.annotations.resolve(),
            *((folder.resolve(), folder.is_dir()) for folder in files.image_folders),
        ]
        digest.update(repr(paths).encode())
        try:
            for part in contents(files):
                digest.update(part)
        except OSError as error:
            raise DataError(f"{files.annotations}: can't be read ({error}). Check path and permissions.") from error
    return digest.hexdigest()[:32]


@contextmanager
def unwrap_data_errors() -> Iterator[None]:
    """Raise a DataError itself instead of the error that datasets wraps around it."""
    try:
        yield
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


@dataclass
class CocoConfig(datasets.BuilderConfig):  # type: ignore[misc]
    """What a build reads, whether it may hold out validation images, and how the images are read."""

    layout: tuple[SplitFiles, ...] = field(default=())
    hold_out: bool = False
    exif_frame: ExifFrame = "auto"
    pixel_range: PixelRange | Literal["auto"] = "auto"


class CocoBuilder(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Writes the rows of every split to the cache, once."""

    BUILDER_CONFIG_CLASS = CocoConfig
    VERSION = datasets.Version("1.0.0")
    report = TrainingReport()

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        self.report = TrainingReport()
        read = {files.split: read_optional(files, self.report) for files in self.config.layout}
        splits: Mapping[str, SplitAnnotations] = {name: split for name, split in read.items() if split is not None}
        splits, categories = used_categories(splits, self.report)
        splits = with_reading(splits, self.config.exif_frame, self.config.pixel_range, self.report)
        splits = with_validation(splits) if self.config.hold_out else splits
        self.info.features = row_features(categories)
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": split}) for name, split in splits.items()]

    def _generate_tables(self, split: SplitAnnotations) -> Iterator[tuple[int, pa.Table]]:
        for number, batch in enumerate(batches_of_rows(split.rows(self.report))):
            yield number, pa.Table.from_pylist(batch, schema=self.info.features.arrow_schema)


def batches_of_rows(rows: Iterable[Entry]) -> Iterator[list[Entry]]:
    """The rows in lists of at most `_ROWS_PER_TABLE`, which end where the images inside them reach `_BYTES_PER_TABLE`.

    The rows of a list are in memory at a time.
    """
    batch: list[Entry] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row["image"]["bytes"] or b"")
        if len(batch) == _ROWS_PER_TABLE or size >= _BYTES_PER_TABLE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def used_categories(
    splits: Mapping[str, Annotations], report: Report = raise_problem
) -> tuple[dict[str, Annotations], list[Category]]:
    """The splits with one id for each class name, and the categories with an annotation in any of them, by id.

    Roboflow's super-category has no annotations and so is left out. Reports the problems of `match_categories`, and a
    dataset without annotations.
    """
    matched, names = match_categories(splits, report)
    if not names:
        everywhere = ", ".join(dict.fromkeys(split.name for split in splits.values()))
        report(
            "no-objects", everywhere, [], f"expected annotated objects, found none in {everywhere}. Add annotations."
        )
    return matched, [Category(key, name) for key, name in names.items()]


def with_reading(
    splits: Mapping[str, Annotations], exif_frame: ExifFrame, pixel_range: PixelRange | Literal["auto"], report: Report
) -> dict[str, Annotations]:
    """The splits with how their images are read; reports photos whose frame is not known."""
    photos = [photo for split in splits.values() for photo in split.photos()]
    reading = find_reading(photos, exif_frame, pixel_range, report)
    return {name: replace(split, reading=reading) for name, split in splits.items()}


# holding out a validation split


def held_out(names: Sequence[str], annotated: Sequence[bool] | None = None) -> list[int]:
    """The indices of the images to hold out, in order: the fifth with the smallest SHA-256 of the name.

    Images with objects (`annotated`) are held out in the same proportion, at least one if there are two. The choice of
    an image hardly depends on the other images, and not on their order. Of fewer than five images none is held out.
    """
    digests = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in names]
    ranked = sorted(range(len(names)), key=lambda index: digests[index])
    total = len(names) // _HELD_OUT
    first = [index for index in ranked if annotated is None or annotated[index]]
    rest = [index for index in ranked if annotated is not None and not annotated[index]]
    share = min(total, max(round(total * len(first) / max(1, len(names))), len(first) > 1))
    return sorted([*first[:share], *rest[: total - share]])


def lacks_validation(splits: Mapping[str, object]) -> bool:
    """Whether there is a training split but no validation split."""
    return "train" in splits and "valid" not in splits


def with_validation(splits: Mapping[str, Annotations]) -> dict[str, Annotations]:
    """The splits; if there is no `valid`, it is held out of `train`."""
    if not lacks_validation(splits):
        return dict(splits)
    images, annotations = splits["train"].images, splits["train"].annotations
    annotated = [any(not entry.get("iscrowd") for entry in annotations.get(image["id"], [])) for image in images]
    chosen = set(held_out([image["file_name"] for image in images], annotated))
    if not chosen:
        return dict(splits)
    train, valid = (_part(splits["train"], chosen, inside=inside) for inside in (False, True))
    return {"train": train, "valid": valid, **{name: split for name, split in splits.items() if name != "train"}}


def _part(split: Annotations, chosen: set[int], *, inside: bool) -> Annotations:
    images = tuple(image for index, image in enumerate(split.images) if (index in chosen) is inside)
    return replace(split, images=images, annotations={image["id"]: split.annotations[image["id"]] for image in images})


def rows_with_validation(splits: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    """`with_validation` for rows of a Hub dataset; images are chosen by the file names that `m2f check` gives them."""
    if not lacks_validation(splits):
        return datasets.DatasetDict(splits)
    names = [f"{number}.png" for number in splits["train"]["image_id"]]
    objects = splits["train"].select_columns("objects")
    chosen = held_out(names, [any(not one["iscrowd"] for one in row["objects"]) for row in objects])
    if not chosen:
        return datasets.DatasetDict(splits)
    rest = sorted(set(range(len(names))) - set(chosen))
    train, valid = (splits["train"].select(indices) for indices in (rest, chosen))
    others = {name: rows for name, rows in splits.items() if name != "train"}
    return datasets.DatasetDict({"train": train, "valid": valid, **others})


def warn_held_out(dataset: object, splits: Mapping[str, datasets.Dataset]) -> None:
    """Log how many training images are held out for validation."""
    valid = len(splits["valid"])
    logger.warning(
        "%s has no validation split: %d of its %d training images, chosen by a hash of the file name, are held out for"
        " validation where a model is trained on it",
        dataset,
        valid,
        valid + len(splits["train"]),
    )
