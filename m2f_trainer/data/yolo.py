"""YOLO segmentation folders: a data.yaml with names and image folders, and beside each image folder one of labels.

A label file has the image's name and a line for each object: `class x y x y ...`, in shares of the image's sides.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from m2f_trainer.data.coco_json import AnnotationFile, Entry, is_text
from m2f_trainer.data.images import SUFFIXES, image_size
from m2f_trainer.data.layouts import SplitFiles
from m2f_trainer.data.problems import Report, refuse
from m2f_trainer.errors import DataError, ImageError
from m2f_trainer.masks import rle

_REACH = 1.0  # a share may lie this far outside 0..1: further out it isn't one


def read_yolo(files: SplitFiles, report: Report = refuse) -> AnnotationFile:
    """Reads and checks one split; image and annotation ids count from 1 in the order of the file names.

    Raises:
        DataError: no names, no images, or a faulty label; the message names file, line and remedy
    """
    names, folder = _names(files.annotations), files.image_folders[0]
    labels = label_folder(folder)
    images: list[Entry] = []
    groups: dict[int, list[Entry]] = {}
    number = 0
    for path in image_files(folder):
        name, image_id = path.relative_to(folder).as_posix(), len(images) + 1
        if not is_text(name):
            report(
                "bad-image", labels, [rle.brief(name)], f"{folder}: the name of {name!r} isn't UTF-8. Rename the file."
            )
            continue
        try:
            height, width = image_size(path, f"image {image_id} ({path})")
        except ImageError as error:
            report("bad-image", labels, [name], str(error))
            continue
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        groups[image_id] = []
        for category, shares in _objects((labels / name).with_suffix(".txt"), names, report, labels):
            number += 1
            polygon = [share * (height if k % 2 else width) for k, share in enumerate(shares)]
            entry = {"id": number, "image_id": image_id, "category_id": category, "segmentation": [polygon]}
            groups[image_id].append(entry)
    if not images:
        raise DataError(f"{folder}: found no images. Add images, or remove the split from {files.annotations}.")
    return AnnotationFile(labels, folder, tuple(images), groups, names)


def image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def label_folder(images: Path) -> Path:
    """As YOLO has it: the last `images` of the path is `labels`."""
    parts = list(images.parts)
    if "images" not in parts:
        return images
    place = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:place], "labels", *parts[place + 1 :])


def contents(files: SplitFiles) -> Iterator[bytes]:
    """What the rows depend on: data.yaml, image names, their sizes (told by those of the files), labels."""
    yield files.annotations.read_bytes()
    labels = label_folder(files.image_folders[0])
    for path in image_files(files.image_folders[0]):
        yield os.fsencode(f"{path} {path.stat().st_size}")
        label = (labels / path.relative_to(files.image_folders[0])).with_suffix(".txt")
        yield label.read_bytes() if label.is_file() else b""


def _objects(label: Path, names: dict[int, str], report: Report, labels: Path) -> Iterator[tuple[int, list[float]]]:
    """(class, x y x y ... in shares) of each sound line; an image without a label file has no objects."""
    try:
        lines = label.read_text(encoding="utf-8-sig").splitlines() if label.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        report("bad-annotation-entry", labels, [label.name], f"{label}: can't be read ({error}). Replace the file.")
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{label}, line {number}"
        category, *shares = _numbers(line)
        problem = _problem(category, shares)
        if problem:
            report("bad-annotation-entry", labels, [f"{label.name}:{number}"], f"{where}: {problem}")
        elif int(category) not in names:
            message = f"{where}: class {int(category)} isn't among the {len(names)} names. Correct it, or add the name."
            report("unknown-category", labels, [f"{label.name}:{number}"], message)
        else:
            yield int(category), shares


def _numbers(line: str) -> list[float]:
    """The line's numbers, NaN for what isn't one."""
    return [float(word) if re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", word) else math.nan for word in line.split()]


def _problem(category: float, shares: list[float]) -> str:
    if math.isnan(category) or category % 1 or category < 0:
        return "expected a class number first. Correct the line."
    if len(shares) == 4:
        return "expected an outline `class x y x y ...`, got a box of four numbers. Export it for segmentation."
    if len(shares) < 6 or len(shares) % 2:
        return f"expected at least three points x y, got {len(shares)} numbers. Correct the line."
    if not all(-_REACH <= share <= 1 + _REACH for share in shares):
        odd = next(share for share in shares if not -_REACH <= share <= 1 + _REACH)
        return f"expected shares of the image's sides, 0 to 1, got {odd:g}. Divide x by the width and y by the height."
    return ""


def _names(path: Path) -> dict[int, str]:
    names = read_yaml(path).get("names")
    listed = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(listed, dict) or not listed or not all(type(key) is int for key in listed):
        raise DataError(f"{path}: expected `names` as a list of class names, got {names!r:.60}. Add the names.")
    return {key: str(name) for key, name in listed.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """The file as plain values: tags that would build objects are refused."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: can't be read as YAML ({error}). Correct the file.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected names and image folders, got a {type(content).__name__}. Correct the file.")
    return content


def find_yolo(root: Path) -> Iterator[SplitFiles]:
    """The splits of a data.yaml in `root`. Raises DataError where an image folder isn't there or isn't inside."""
    path = next((root / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (root / name).is_file()), None)
    if path is None:
        return
    content = read_yaml(path)
    for split, keys in (("train", ("train",)), ("valid", ("val", "valid")), ("test", ("test",))):
        value = next((content[key] for key in keys if content.get(key)), None)
        if value is not None:
            yield SplitFiles(split, path, (_folder(root, path, split, value),))


def _folder(root: Path, path: Path, split: str, value: object) -> Path:
    """The image folder of a split; `path:` of the file is left aside, and Roboflow's leading ../ means `root`."""
    if not isinstance(value, str) or value.endswith(".txt"):
        raise DataError(f"{path}: expected an image folder for {split!r}, got {value!r:.60}. Name one folder.")
    inside = root / re.sub(r"^(\.\./|\./)+", "", value.replace("\\", "/"))
    folder = inside / "images" if not (inside.name == "images" or "images" in inside.parts) else inside
    found = folder if folder.is_dir() else inside
    if not found.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{path}: {value!r} of {split!r} leads out of {root}. Name a folder inside it.")
    if not found.is_dir():
        raise DataError(f"{path}: the image folder {found} of {split!r} isn't there. Correct its path.")
    return found
