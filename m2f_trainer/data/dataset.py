"""A COCO folder as a typed, memory-mapped `datasets.DatasetDict`, built once for each content of its annotation files.

A row is one image: `image` {path, bytes}, `image_id`, `height`, `width` (original frame), and `objects`, one entry for
each annotation: `id`, `category_id` (the file's own), `bbox`, `area`, `iscrowd`, `counts` (compressed COCO RLE).
The used categories travel in the dataset's info.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import TypeVar

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Value
from datasets.exceptions import DatasetGenerationError

from m2f_trainer.data.coco_json import AnnotationFile, read_annotations
from m2f_trainer.data.layouts import SplitFiles, find_layout, given_layout
from m2f_trainer.data.problems import Report, refuse
from m2f_trainer.data.yolo import contents, find_yolo, read_yolo
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


def find_splits(
    root: str | Path,
    annotations: Mapping[str, str | Path] | None = None,
    images: Mapping[str, str | Path] | None = None,
) -> tuple[SplitFiles, ...]:
    """The splits of a COCO folder, found or told, or else of a YOLO folder.

    Raises:
        DataError: neither is there
    """
    if annotations:
        return given_layout(root, annotations, images)
    try:
        return find_layout(root)
    except DataError:
        found = tuple(find_yolo(Path(root)))
        if not found:
            raise
        return found


def read_split(files: SplitFiles, report: Report = refuse) -> AnnotationFile:
    """Reads and checks one split. Raises DataError, which names file, ids and remedy."""
    return read_yolo(files, report) if _is_yolo(files) else read_annotations(files, report)


def contents_of(files: SplitFiles) -> Iterator[bytes]:
    """All that the rows of a split depend on, but for the images.

    Raises:
        DataError: it can't be read
    """
    try:
        if _is_yolo(files):
            yield from contents(files)
        else:
            with files.annotations.open("rb") as file:
                while part := file.read(1 << 22):
                    yield part
    except OSError as error:
        raise DataError(f"{files.annotations}: can't be read ({error}). Check path and permissions.") from error


def _is_yolo(files: SplitFiles) -> bool:
    return files.annotations.suffix in (".yaml", ".yml")


File = TypeVar("File", bound=AnnotationFile)

logger = logging.getLogger(__name__)
_EACH = 5  # of so many images, one is held out


def held_out(names: Sequence[str]) -> list[int]:
    """The places of the images that are held out, in order; none of fewer than five."""
    digests = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in names]
    ranked = sorted(range(len(names)), key=lambda place: digests[place])
    return sorted(ranked[: len(names) // _EACH])


def lacks_validation(splits: Mapping[str, object]) -> bool:
    """Whether images are held out of a dataset's training split."""
    return "train" in splits and "valid" not in splits


def with_validation(files: Mapping[str, File]) -> dict[str, File]:
    """The splits, with a `valid` held out of `train` where there is none."""
    names = [image["file_name"] for image in files["train"].images] if lacks_validation(files) else []
    chosen = set(held_out(names))
    if not chosen:
        return dict(files)
    others = {split: file for split, file in files.items() if split != "train"}
    train, valid = (_part(files["train"], chosen, inside=inside) for inside in (False, True))
    return {"train": train, "valid": valid, **others}


def rows_with_validation(splits: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    """The same for the rows of a Hub dataset, which have the names that the doctor gives them."""
    names = [f"{number}.png" for number in splits["train"]["image_id"]] if lacks_validation(splits) else []
    chosen = held_out(names)
    if not chosen:
        return datasets.DatasetDict(splits)
    rest = sorted(set(range(len(names))) - set(chosen))
    others = {split: rows for split, rows in splits.items() if split != "train"}
    train, valid = (splits["train"].select(places) for places in (rest, chosen))
    return datasets.DatasetDict({"train": train, "valid": valid, **others})


def warn(name: object, splits: Mapping[str, datasets.Dataset]) -> None:
    """Tells once what training and scores now rest on."""
    count = len(splits["valid"])
    logger.warning(
        "%s has no validation split: %d of its %d training images, chosen by name, are held out to score on",
        name,
        count,
        count + len(splits["train"]),
    )


def _part(file: File, chosen: set[int], *, inside: bool) -> File:
    images = tuple(image for place, image in enumerate(file.images) if (place in chosen) is inside)
    return replace(file, images=images, annotations={image["id"]: file.annotations[image["id"]] for image in images})


def folded(name: str) -> str:
    """A class name without what people type differently."""
    return " ".join(name.split()).casefold()
