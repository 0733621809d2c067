"""Checks before training and evaluation: splits with objects, images that can be decoded, categories of the same names.

Annotations are checked when the dataset is built. Images are decoded only if a file of the dataset has changed since
the last check: a marker file beside the cached rows records path, size and modification time of each image file.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc

from m2f_trainer.data.categories import normalized_name
from m2f_trainer.data.dataset import Category, categories_of, row_features
from m2f_trainer.data.files import file_state
from m2f_trainer.data.problems import LISTED
from m2f_trainer.data.transforms import read_image
from m2f_trainer.distributed import from_every_rank, from_main, rank_and_world_size
from m2f_trainer.errors import DataError, ImageError

_THREADS = 8  # Pillow decodes without Python's global lock
_ROWS_AT_ONCE = 1024


def check_dataset(
    splits: datasets.DatasetDict, *, train: str = "train", evaluation: Sequence[str] = ("valid",)
) -> None:
    """Check that every split to use exists, that its images can be read, and that train and valid have objects.

    Without objects every AP would be -1, and no checkpoint would be best. With several ranks, all must call this.

    Args:
        train: the split to train on, "" for none
        evaluation: the splits to evaluate on

    Raises:
        DataError: naming every kind of problem with the first ten images
    """
    for name in [train] * bool(train) + [*evaluation]:
        check_split(splits, name)
    for name, use, wanted in ((train, "train on", bool(train)), ("valid", "evaluate on", "valid" in evaluation)):
        if wanted and not has_targets(splits[name]):
            raise DataError(
                f"split {name!r}: expected objects to {use}, found only crowd regions or none. Annotate objects in it."
                " If they are brush masks of CVAT, which it exports as crowd regions, convert them with"
                " m2f check --fix."
            )


def check_split(splits: datasets.DatasetDict, name: str) -> None:
    """Check that the split exists, and that all its images can be read and have the annotated size.

    With several ranks, all must call this.

    Raises:
        DataError: the split is missing or empty, or images can't be used
    """
    if name not in splits or not len(splits[name]):
        raise DataError(
            f"expected a split {name!r} with images, found {', '.join(splits) or 'none'}."
            f" Add it to the dataset folder, or name another split."
            + " Or add training images: of at least five, a fifth is held out for validation."
            * (name == "valid")
        )
    problems = check_images_once(splits[name])
    if problems:
        more = f"\n... and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        first = "\n".join(problems[:LISTED])
        raise ImageError(f"split {name!r}: {len(problems)} image(s) can't be used:\n{first}{more}")


def check_images_once(rows: datasets.Dataset) -> list[str]:
    """A message for each image that can't be decoded or doesn't have the annotated size, on every rank.

    The main rank checks whether these images have already passed. If not, each rank decodes its share.
    """
    marker: Path | None = from_main(lambda: _marker(rows))
    if from_main(lambda: marker is not None and marker.is_file()):
        return []
    rank, world_size = rank_and_world_size()
    share = rows.select(range(rank, len(rows), world_size)) if world_size > 1 else rows
    problems = from_every_rank(list(image_problems(share)))
    if not problems and marker is not None and rank == 0:
        with contextlib.suppress(OSError):  # a cache that can't be written to: the next start decodes again
            marker.touch()
    return problems


def _marker(rows: datasets.Dataset) -> Path | None:
    """The marker file, which exists once these images have passed; None for rows that aren't cached on disk.

    Its name is a hash of the cache files, of the image ids and sizes, and of path, size and modification time of the
    image files.
    """
    cache_files = [file["filename"] for file in rows.cache_files]
    if not cache_files:
        return None
    digest = hashlib.sha256(repr([(path, file_state(path)) for path in cache_files]).encode())
    embedded = all(chunk.field("bytes").null_count == 0 for chunk in rows.data.column("image").chunks)
    columns = ["image_id", "height", "width"] + ["image"] * (not embedded)  # the data itself is never read
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for row in table.select(columns[:3]).to_pylist():
            digest.update(repr(list(row.values())).encode())
        for chunk in table["image"].chunks if not embedded else ():
            for path in chunk.field("path").to_pylist():
                digest.update(repr((path, file_state(path or ""))).encode())
    return Path(cache_files[0]).parent / f"images-{digest.hexdigest()[:32]}.checked"


def image_problems(rows: datasets.Dataset) -> Iterator[str]:
    """A message for each image that can't be decoded or has another size than its annotations say."""
    light = rows.remove_columns("objects")
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(light), _ROWS_AT_ONCE):
            batch = [light[i] for i in range(start, min(start + _ROWS_AT_ONCE, len(light)))]
            yield from (problem for problem in pool.map(_image_problem, batch) if problem)


def _image_problem(row: Mapping[str, Any]) -> str | None:
    try:
        read_image(row)
    except ImageError as error:
        return str(error)
    return None


def has_targets(rows: datasets.Dataset) -> bool:
    """Whether any annotation isn't a crowd region."""
    column = rows.select_columns("objects").with_format("arrow")[:]["objects"]
    return any(pc.min(chunk.flatten().field("iscrowd")).as_py() is False for chunk in column.chunks)


def match_rows(known: Sequence[Category], rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with the category ids of a model, by `matched_ids`. Raises DataError as it does."""
    ids = matched_ids(known, rows)
    if all(key == new for key, new in ids.items()):
        return rows
    names = {category.id: category.name for category in known}
    found = categories_of(rows)
    categories = sorted((Category(ids[one.id], names.get(ids[one.id], one.name)) for one in found), key=lambda c: c.id)

    def renumbered(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"objects": [{**one, "category_id": ids[one["category_id"]]} for one in row["objects"]]}

    return rows.map(renumbered, features=row_features(categories))


def matched_ids(known: Sequence[Category], rows: datasets.Dataset) -> dict[int, int]:
    """The id in a model of each category of the rows, matched by name: exact first, then without regard to case.

    A class that the model doesn't have keeps its id if that is free. A number in place of a name matches by id.

    Raises:
        DataError: an id has another name in the model, which the dataset lacks: a renamed class, or another one
    """
    names = {category.id: category.name for category in known}
    found = categories_of(rows)
    own = {normalized_name(category.name) for category in found}
    ids: dict[int, int] = {}
    free = max([*names, *(category.id for category in found)], default=0) + 1
    for category in found:
        name, new = names.get(category.id), _id_by_name(known, category)
        if new is None and name is not None and str(category.id) in (name, category.name):
            new = category.id
        if new is None and name is not None:
            if normalized_name(name) not in own:
                raise DataError(
                    f"category {category.id} is {name!r} in the model and {category.name!r} in the dataset."
                    " Give the dataset's categories the names that the model has."
                )
            new, free = free, free + 1
        ids[category.id] = category.id if new is None else new
    return ids


def _id_by_name(known: Sequence[Category], category: Category) -> int | None:
    exact = [one.id for one in known if one.name.strip() == category.name.strip()]
    alike = [one.id for one in known if normalized_name(one.name) == normalized_name(category.name)]
    same = exact or alike
    return category.id if category.id in same else same[0] if len(same) == 1 else None
