"""A COCO folder as a typed, memory-mapped `datasets.DatasetDict`, built once for each content of its annotation files.

A row is one image: `image` {path, bytes}, `image_id`, `height`, `width` (original frame), and `objects`, one entry for
each annotation: `id`, `category_id` (the file's own), `bbox`, `area`, `iscrowd`, `counts` (compressed COCO RLE).
The used categories travel in the dataset's info.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import Value
from datasets.exceptions import DatasetGenerationError

from m2f_trainer.data.annotations import AnnotationFile, read_annotations
from m2f_trainer.data.layouts import SplitFiles, find_layout, given_layout
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
_ROW_FORMAT = "1"  # raise it when rows change, so that older caches are left behind


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

    Args:
        root: the dataset folder, in one of the layouts of `find_layout`
        cache_dir: where the rows are kept; datasets' own cache by default
        annotations, images: annotation file and image folder by split, relative to `root`, where it has another layout

    Raises:
        DataError: the folder or its annotations can't be used; the message names file, id and remedy
    """
    layout = given_layout(root, annotations, images) if annotations else find_layout(root)
    builder = CocoBuilder(
        cache_dir=None if cache_dir is None else str(cache_dir),
        dataset_name="coco",
        config_id=_cache_name(root),
        hash=_fingerprint(layout),
        layout=layout,
    )
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    return builder.as_dataset()


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
    """What a build reads."""

    layout: tuple[SplitFiles, ...] = field(default=())


class CocoBuilder(datasets.GeneratorBasedBuilder):  # type: ignore[misc]
    """Writes the rows of every split to the cache, once."""

    BUILDER_CONFIG_CLASS = CocoConfig
    VERSION = datasets.Version("1.0.0")

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        files = {layout.split: read_annotations(layout) for layout in self.config.layout}
        categories = [{"id": category.id, "name": category.name} for category in _used_categories(files)]
        self.info.description = json.dumps({"categories": categories})
        return [datasets.SplitGenerator(name=split, gen_kwargs={"file": file}) for split, file in files.items()]

    def _generate_examples(self, file: AnnotationFile) -> Any:
        yield from enumerate(file.rows())


def _used_categories(files: Mapping[str, AnnotationFile]) -> list[Category]:
    """Those with an annotation in any split, by id; a Roboflow super-category has none and goes."""
    names: dict[int, tuple[str, Path]] = {}
    used: set[int] = set()
    for file in files.values():
        used |= file.used_categories()
        for key, name in file.categories.items():
            first, where = names.setdefault(key, (name, file.path))
            if first != name:
                raise DataError(
                    f"category {key} is {first!r} in {where} but {name!r} in {file.path}."
                    " Give it one name in all splits, or two ids."
                )
    if not used:
        listed = ", ".join(str(file.path) for file in files.values())
        raise DataError(f"expected annotated objects, found none in {listed}. Add annotations.")
    return [Category(key, names[key][0]) for key in sorted(used)]


def _cache_name(root: str | Path) -> str:
    """A folder name that tells a reader of the cache which dataset it is of."""
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(root).resolve().name)
    return name[:40] or "coco"


def _fingerprint(layout: tuple[SplitFiles, ...]) -> str:
    """A hash of what the rows depend on: annotation contents, and where annotations and images are."""
    digest = hashlib.sha256(_ROW_FORMAT.encode())
    for files in layout:
        place = [
            files.split,
            files.annotations.resolve(),
            *((folder.resolve(), folder.is_dir()) for folder in files.image_folders),
        ]
        digest.update(repr(place).encode())
        try:
            with files.annotations.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{files.annotations}: can't be read ({error}). Check path and permissions.") from error
    return digest.hexdigest()[:32]
