"""Validation images for datasets that have none, as many tools export them: a fifth of the training split.

Which ones is a function of the images' names alone, so training, scoring and the doctor agree, an image stays where it
is when others are added, and the order of a file says nothing.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import datasets

from m2f_trainer.data.annotations import AnnotationFile

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
