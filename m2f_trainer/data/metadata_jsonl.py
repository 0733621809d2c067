"""Read imagefolder datasets: a metadata.jsonl beside the images, with a line `{"file_name": ..., "objects": ...}` for
each image. Lines of one image are merged.

`objects` is a list of objects or an object of lists, as in Hugging Face datasets. An object has a category (a number or
a name) and a segmentation in COCO's form.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from m2f_trainer.data.files import files_below
from m2f_trainer.data.layouts import SPLITS, SplitFiles, by_split, split_of
from m2f_trainer.data.normalize import is_text, type_name
from m2f_trainer.data.objects import (
    MASK_KEYS,
    CategoryFields,
    category_of,
    mixed_categories,
    split_objects,
    with_one_only,
)
from m2f_trainer.data.problems import Report, raise_problem
from m2f_trainer.data.reading import size_in_frame
from m2f_trainer.data.splits import Entry, FolderSplit, ImageEntries, pack_polygons
from m2f_trainer.errors import DataError, ImageError
from m2f_trainer.masks.rle import brief

_NAME = "metadata.jsonl"


def find_metadata(root: Path) -> tuple[SplitFiles, ...]:
    """The splits of a folder with metadata.jsonl files: by the folders that they are in, such as `train`.

    The images of a single file that is in no such folder are split by the folders in their names, where they have some.

    Raises:
        DataError: some files or images are in folders of splits and some are not, or two files are in one split
    """
    files = [path for path in files_below(root, (".jsonl",)) if path.name.lower() == _NAME and _has_objects(path)]
    used = {category for path in files for category in _categories(path)}
    unnamed, numberless = with_one_only(used)
    classes = {name for name, _ in used if name is not None} if numberless or not unnamed else set()
    found = by_split(root, files, "imagefolder", tuple(sorted(classes)))
    return tuple(_by_image_names(found[0])) if len(files) == 1 else found


def _by_image_names(files: SplitFiles) -> Iterator[SplitFiles]:
    """The splits of one file by the first folder of its image names; the file as one split where they have none."""
    (path,) = files.files
    names = [row["file_name"] for _, row in _rows(path) if isinstance(row, Mapping) and is_text(row.get("file_name"))]
    folders = {_split_folder(name): PurePosixPath(name).parts[0] for name in names}
    if path.parent != files.image_folders[0] or len(folders) < 2:
        yield files
        return
    if None in folders:
        raise DataError(
            f"{path}: some images are in folders of splits ({', '.join(filter(None, folders))}) and some are not, such"
            f" as {folders[None]!r}. Move them into train, valid or test, and correct their `file_name`."
        )
    for split in filter(folders.__contains__, dict.fromkeys(SPLITS.values())):
        yield replace(files, split=split, annotations=path.parent / folders[split])


def _split_folder(name: str) -> str | None:
    """The split that the first folder of an image name stands for; None if it is no split's, or there is no folder."""
    parts = PurePosixPath(name).parts
    return split_of(parts[0]) if len(parts) > 1 else None


def _has_objects(path: Path) -> bool:
    return any(isinstance(row, Mapping) and "objects" in row for _, row in _rows(path))


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line, None for a line that isn't JSON. Raises OSError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    yield number, None


def _categories(path: Path) -> Iterator[CategoryFields]:
    """Name and number of each object's category."""
    for _, row in _rows(path):
        try:
            objects = split_objects(row["objects"], "") if isinstance(row, Mapping) and "objects" in row else []
        except DataError:  # reported when the rows are read
            continue
        yield from (category_of(one) for one in objects if isinstance(one, Mapping))


def read_metadata(files: SplitFiles, report: Report = raise_problem) -> FolderSplit:
    """Read and check one split; image and annotation ids count from 1 in the order of the lines.

    Raises:
        DataError: no usable line, or an invalid one; the message names file, line and remedy
    """
    root, name = files.image_folders[0], str(files.annotations)
    names = dict(enumerate(files.classes, start=1))
    ids = {label: number for number, label in names.items()}
    entries = ImageEntries(name, report)
    groups: dict[int, list[Entry]] = {}
    left_out: list[int] = []
    number = 0
    for path in files.files:
        for line, row in _rows(path):
            where = f"{path}, line {line}"
            if not path.is_relative_to(files.annotations) and _of_another_split(row, files.split):
                continue
            image = _image(row, path, files, len(entries.images) + 1, where, report)
            if image is not None:
                shown = f"{where}: {image['file_name']}"
                image = entries.add(image, root / image["file_name"], shown, f"{path.name}:{line}")
            image_id = None if image is None else image["id"]
            if image is not None:
                groups.setdefault(image["id"], [])
            of_line = partial(report, file=name, image=image_id)
            for category, one in _objects(row, ids, where, f"{path.name}:{line}", of_line):
                number += 1
                if image is None:
                    left_out.append(number)
                    continue
                if category not in names:
                    names[category] = str(category)
                if isinstance(one["segmentation"], str):
                    one["segmentation"] = {"size": [image["height"], image["width"]], "counts": one["segmentation"]}
                entry = {"id": number, "image_id": image["id"], "category_id": category, **one}
                groups[image["id"]].append(pack_polygons(entry))
    if not entries.images:
        raise DataError(f"{name}: found no usable line in {_NAME}. Correct it, or remove the split.")
    images = tuple(entries.images)
    return FolderSplit(name, images, groups, names, root, follow_links=files.follow_links, left_out=left_out)


def _of_another_split(row: Any, split: str) -> bool:
    """Whether a line of a file with several splits has the name of an image of another split."""
    written = row.get("file_name") if isinstance(row, Mapping) else None
    return isinstance(written, str) and _split_folder(written) not in (None, split)


def _image(row: Any, path: Path, files: SplitFiles, image_id: int, where: str, report: Report) -> Entry | None:
    root, name = files.image_folders[0], str(files.annotations)
    written = row.get("file_name") if isinstance(row, Mapping) else None
    if not isinstance(row, Mapping) or not written or not is_text(written):
        message = f"{where}: expected an object with a `file_name`, got {brief(row)}. Correct the line."
        report("bad-image-entry", name, [f"{path.name}:{image_id}"], message)
        return None
    folder = path.parent.relative_to(root).as_posix()
    file_name = written if folder == "." else f"{folder}/{written}"
    image = {"id": image_id, "file_name": file_name}
    try:
        source = FolderSplit(name, (), {}, {}, root, follow_links=files.follow_links).source(image)
        image["height"], image["width"] = size_in_frame(source, f"{where} ({written})", files.exif_frame, name, report)
    except ImageError as error:
        report("bad-image", name, [file_name], str(error))
        return None
    except DataError as error:
        report("unsafe-path", name, [file_name], str(error))
        return None
    return image


def _objects(row: Any, ids: Mapping[str, int], where: str, key: str, report: Any) -> Iterator[tuple[int, Entry]]:
    """(category id, fields) of each object of a line; `key` is the line in findings.

    Raises:
        DataError: an object has a number as category, and others of the dataset only a name
    """
    try:
        objects = split_objects(row.get("objects") or [], where) if isinstance(row, Mapping) else []
    except DataError as error:
        report("bad-annotation-entry", ids=[key], message=str(error))
        return
    for index, one in enumerate(objects):
        label, number = category_of(one) if isinstance(one, Mapping) else (None, None)
        if ids and label is None and number is not None:
            raise mixed_categories(f"{where}, object {index}", number, next(iter(ids)))
        category = ids.get(label or "") if ids else number
        if category is None:
            found = f"a {type_name(one)}" if not isinstance(one, Mapping) else f"fields {', '.join(map(str, one))}"
            message = f"{where}, object {index}: expected a category, got {found}. Add one."
            report("bad-annotation-entry", ids=[f"{key}:{index}"], message=message)
        elif one.get("iscrowd") not in (None, 0, 1):
            message = f"{where}, object {index}: expected an `iscrowd` of 0 or 1, got {brief(one['iscrowd'])}."
            report("bad-crowd", ids=[f"{key}:{index}"], message=f"{message} Correct it.")
        else:
            mask = next((one[name] for name in MASK_KEYS if one.get(name) is not None), None)
            box, area = one.get("bbox"), one.get("area")
            yield category, {"segmentation": mask, "bbox": box, "area": area, "iscrowd": int(one.get("iscrowd") or 0)}
