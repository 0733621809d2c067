"""What training would refuse, found before it starts: annotations are checked as they are read, images here."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets

from m2f_trainer.data.dataset import Category, categories_of, folded
from m2f_trainer.data.images import open_image
from m2f_trainer.data.transforms import describe
from m2f_trainer.errors import DataError, ImageError

_THREADS = 8  # Pillow decodes without the interpreter's lock
_LISTED = 10


def check_dataset(
    splits: datasets.DatasetDict, *, train: str = "train", evaluation: Sequence[str] = ("valid",)
) -> None:
    """The error part of `m2f check`: every split asked for is there with images that can be read, and train and valid
    have objects (without them every AP would be -1, and no model better than another).

    Args:
        train: the split to train on, "" for none
        evaluation: the splits to score on

    Raises:
        DataError: naming every kind of problem with the first ten images
    """
    for name in [train] * bool(train) + [*evaluation]:
        check_split(splits, name)
    for name, use, wanted in ((train, "train on", bool(train)), ("valid", "score on", "valid" in evaluation)):
        if wanted and not _has_targets(splits[name]):
            raise DataError(
                f"split {name!r}: expected objects to {use}, found only crowd regions or none. Annotate objects in it;"
                " of CVAT's brush masks, which it writes as crowds, m2f check --fix makes objects."
            )


def check_split(splits: datasets.DatasetDict, name: str) -> None:
    """One split is there, and all its images can be read and have the size their annotations say.

    Raises:
        DataError: the split is missing or empty, or images are bad
    """
    if name not in splits or not len(splits[name]):
        raise DataError(
            f"expected a split {name!r} with images, found {', '.join(splits) or 'none'}."
            f" Add it to the dataset folder, or name another split."
            + " Or add images: of five or more in 'train', a fifth is held out to score on."
            * (name == "valid")
        )
    problems = list(image_problems(splits[name]))
    if problems:
        more = f"\n... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "\n".join(problems[:_LISTED])
        raise ImageError(f"split {name!r}: {len(problems)} image(s) can't be used:\n{listed}{more}")


def check_categories(known: Sequence[Category], rows: datasets.Dataset) -> None:
    """A split's category ids mean what they mean to a model: its scores would be of other classes otherwise.

    Raises:
        DataError: an id of both has two names; case, spaces and a number in place of a name aside
    """
    names = {category.id: category.name for category in known}
    for category in categories_of(rows):
        name = names.get(category.id, category.name)
        if folded(name) != folded(category.name) and str(category.id) not in (name, category.name):
            raise DataError(
                f"category {category.id} is {name!r} to the model and {category.name!r} in the dataset."
                " Give the dataset's categories the ids and names that the model has."
            )


def image_problems(rows: datasets.Dataset) -> Iterator[str]:
    """A message for each image that can't be decoded or has another size than its annotations say."""
    light = rows.select_columns(["image", "image_id", "height", "width"])
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(light), 1024):
            batch = [light[i] for i in range(start, min(start + 1024, len(light)))]
            yield from (problem for problem in pool.map(_image_problem, batch) if problem)


def _image_problem(row: Mapping[str, Any]) -> str | None:
    try:
        open_image(row["image"], describe(row), size=(row["height"], row["width"]))
    except ImageError as error:
        return str(error)
    return None


def _has_targets(rows: datasets.Dataset) -> bool:
    """Whether any annotation isn't a crowd region, read column-wise."""
    column = rows.select_columns("objects").with_format("arrow")[:]["objects"]
    return any(not crowd for chunk in column.chunks for crowd in chunk.flatten().field("iscrowd").to_pylist())
