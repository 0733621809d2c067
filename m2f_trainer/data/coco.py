"""A COCO folder as a typed, memory-mapped `datasets.DatasetDict`, built once for each content of its annotation files.

A row is one image: `image` {path, bytes}, `image_id`, `height`, `width` (original frame), and `objects`, one entry for
each annotation: `id`, `category_id` (the file's own), `bbox`, `area`, `iscrowd`, `counts` (compressed COCO RLE).
The used categories travel in the dataset's info.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Value
from datasets.exceptions import DatasetGenerationError

from m2f_trainer.data.annotations import AnnotationFile
from m2f_trainer.data.findings import Report, refuse
from m2f_trainer.data.holdout import warn, with_validation
from m2f_trainer.data.layouts import SplitFiles
from m2f_trainer.data.sources import contents_of, find_splits, read_split
from m2f_trainer.errors import DataError

FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "image_id": Value("int64"),
        "height": Value("int32"),
        "width": Value("int32"),
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
_BATCH = 1000  # rows a table
_ROW_FORMAT = "3"  # raise it when rows change, so that older caches are left behind


@dataclass(frozen=True)
class Category:
    """One used category: `id` is the annotation file's own."""

    id: int
    name: str


def load_coco(
    root: str | Path,
    *,
    cache_dir: str | Path | None = None,
    annotations: Mapping[str, str | Path] | None = None,
    images: Mapping[str, str | Path] | None = None,
) -> datasets.DatasetDict:
    """The splits of a COCO folder, under the names train, valid and test.

    Where there is no valid, a fifth of the training images is held out as such.

    Args:
        root: the dataset folder, in one of the layouts of `find_layout`, or a YOLO folder with a data.yaml
        cache_dir: where the rows are kept; datasets' own cache by default
        annotations, images: annotation file and image folder by split, relative to `root`, where it has another layout;
            nothing is held out then

    Raises:
        DataError: the folder or its annotations can't be used; the message names file, id and remedy
    """
    layout, hold_out = find_splits(root, annotations, images), not annotations
    builder = CocoBuilder(
        cache_dir=None if cache_dir is None else str(cache_dir),
        dataset_name="coco",
        config_id=_cache_name(root),
        hash=_fingerprint(layout, hold_out),
        layout=layout,
        hold_out=hold_out,
    )
    with advice_alone():
        builder.download_and_prepare()
    splits = builder.as_dataset()
    if len(splits) > len(layout):
        warn(root, splits)
    return splits


@contextmanager
def advice_alone() -> Iterator[None]:
    """Lets a DataError out of the error that datasets wrap around it."""
    try:
        yield
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def features_of(categories: Sequence[Category]) -> datasets.Features:
    """A row's features, which carry the categories too: of a dataset's info, the Hub keeps nothing else."""
    names = [json.dumps([category.id, category.name], ensure_ascii=False) for category in categories]
    return datasets.Features({**FEATURES, "categories": datasets.ClassLabel(names=names)})


def describe_categories(categories: Sequence[Category]) -> str:
    """The categories as a dataset's info holds them."""
    return json.dumps({"categories": [{"id": one.id, "name": one.name} for one in categories]})


def categories_of(dataset: datasets.Dataset) -> tuple[Category, ...]:
    """The categories used in any split of the folder a dataset comes from, by id: class k is the k-th.

    Raises:
        DataError: the dataset wasn't built by `load_coco`
    """
    try:
        stored = json.loads(dataset.info.description)["categories"]
        return tuple(Category(int(entry["id"]), str(entry["name"])) for entry in stored)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "expected a dataset with its categories in its info, as `load_coco` builds it, found none."
            " Build the dataset with `load_coco`."
        ) from error


@dataclass
class CocoConfig(datasets.BuilderConfig):  # type: ignore[misc]
    """What a build reads, and whether it may hold out validation images."""

    layout: tuple[SplitFiles, ...] = field(default=())
    hold_out: bool = False


class CocoBuilder(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Writes the rows of every split to the cache, once."""

    BUILDER_CONFIG_CLASS = CocoConfig
    VERSION = datasets.Version("1.0.0")

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        files = {layout.split: read_split(layout) for layout in self.config.layout}
        files = with_validation(files) if self.config.hold_out else files
        categories = used_categories(files)
        self.info.description = describe_categories(categories)
        self.info.features = features_of(categories)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"file": file}) for split, file in files.items()]

    def _generate_tables(self, file: AnnotationFile) -> Iterator[tuple[int, pa.Table]]:
        rows = file.rows()
        for number in count():
            batch = list(islice(rows, _BATCH))
            if not batch:
                return
            yield number, pa.Table.from_pylist(batch, schema=self.info.features.arrow_schema)


def used_categories(files: Mapping[str, AnnotationFile], report: Report = refuse) -> list[Category]:
    """Those with an annotation in any split, by id; a Roboflow super-category has none and goes.

    Reports an id with two names, and a dataset without annotations.
    """
    names: dict[int, tuple[str, Path]] = {}
    used: set[int] = set()
    for file in files.values():
        used |= file.used_categories()
        for key, name in file.categories.items():
            first, where = names.setdefault(key, (name, file.path))
            if first != name:
                message = (
                    f"category {key} is {first!r} in {where} but {name!r} in {file.path}."
                    " Give it one name in all splits, or two ids."
                )
                report("renamed-category", file.path, [key], message)
    if not used:
        listed = ", ".join(str(file.path) for file in files.values())
        report("no-objects", listed, [], f"expected annotated objects, found none in {listed}. Add annotations.")
    return [Category(key, names[key][0]) for key in sorted(used)]


def _cache_name(root: str | Path) -> str:
    """A folder name that tells a reader of the cache which dataset it is of."""
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(root).resolve().name)
    return name[:40] or "coco"


def _fingerprint(layout: tuple[SplitFiles, ...], hold_out: bool) -> str:
    """A hash of what the rows depend on: annotation contents, and where annotations and images are."""
    digest = hashlib.sha256(f"{_ROW_FORMAT} {hold_out}".encode())
    for files in layout:
        place = [
            files.split,
            files.annotations.resolve(),
            *((folder.resolve(), folder.is_dir()) for folder in files.image_folders),
        ]
        digest.update(repr(place).encode())
        for part in contents_of(files):
            digest.update(part)
    return digest.hexdigest()[:32]
