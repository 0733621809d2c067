"""Read YOLO segmentation folders: a data.yaml with class names and image folders, and a folder of labels for each.

A label file is named as its image and has one line per object: `class x y x y ...`, as fractions of width and height.
"""

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml  # type: ignore[import-untyped]

from m2f_trainer.config.arguments import ExifFrame
from m2f_trainer.data.files import file_state, files_below, subfolders, visible
from m2f_trainer.data.images import SUFFIXES
from m2f_trainer.data.layouts import SplitFiles, named_folders, split_of
from m2f_trainer.data.normalize import is_text
from m2f_trainer.data.problems import ADD_OUTLINES, Report, raise_problem
from m2f_trainer.data.reading import size_in_frame
from m2f_trainer.data.splits import Entry, FolderSplit, pack_polygons
from m2f_trainer.errors import DataError, EmptySplitError, ImageError, printable
from m2f_trainer.masks import rle

logger = logging.getLogger(__name__)

_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
_MARGIN = 1.0  # a fraction may lie this far outside 0..1; further out it is a mistake


def find_yolo(root: Path, path: Path | None = None) -> tuple[SplitFiles, ...]:
    """The splits of a data.yaml: `path`, or the one in `root`; without one, those of Label Studio's classes.txt beside
    images/ and labels/. Empty if there is neither.

    Raises:
        DataError: an image folder doesn't exist, or isn't inside `root`
    """
    path = path or next((root / name for name in _NAMES if (root / name).is_file()), None) or _yaml_of_any_name(root)
    if path is None:
        return tuple(_splits_of_classes(root))
    content = read_yaml(path)
    bases = _bases(root, content.get("path"))
    found = []
    for split, keys in (("train", ("train",)), ("valid", ("val", "valid", "validation")), ("test", ("test",))):
        value = next((content[key] for key in keys if content.get(key)), None)
        if value is None:
            continue
        if split != "test" or not isinstance(value, str) or _place(bases, value).exists():
            found.append(_split(bases, path, split, value if isinstance(value, list) else [value]))
        else:
            logger.warning("%s: the test split %r doesn't exist and is left out", path, value)
    return tuple(found)


def _bases(root: Path, value: object) -> list[Path]:
    """The folders that paths of a data.yaml start from: that of its `path:`, if it is relative, then the dataset's.

    An absolute `path:` is that of the dataset's folder, on this machine or on another one.
    """
    parts = _parts(value) if isinstance(value, str) and not PureWindowsPath(value).anchor else ()
    return [root.joinpath(*parts), root] if parts and ".." not in parts and root.joinpath(*parts).is_dir() else [root]


def _yaml_of_any_name(root: Path) -> Path | None:
    """The only YAML file in a folder that has class names and training images."""
    found = []
    for path in visible(root):
        if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
            with contextlib.suppress(DataError):
                found += [path] * ({"names", "train"} <= read_yaml(path).keys())
    return found[0] if len(found) == 1 else None


def _splits_of_classes(root: Path) -> Iterator[SplitFiles]:
    """The splits of classes.txt beside images/ and labels/, which may have a folder for each split."""
    classes, images, labels = (root / name for name in ("classes.txt", "images", "labels"))
    if classes.is_file() and images.is_dir() and any(labels.rglob("*.txt")):
        parts = [(split, folder) for folder in subfolders(images) if (split := split_of(folder.name))]
        for split, folder in parts or [("train", images)]:
            yield SplitFiles(split, classes, (folder,), "YOLO")


def _split(bases: Sequence[Path], path: Path, split: str, values: Sequence[object]) -> SplitFiles:
    """A split of a data.yaml, from its image folders and text files that list images."""
    lists = [isinstance(one, str) and one.endswith(".txt") and _place(bases, one).is_file() for one in values]
    if not any(lists):
        return SplitFiles(split, path, tuple(_folder(bases, path, split, value) for value in values), "YOLO")
    files = [
        file
        for value, is_list in zip(values, lists, strict=True)
        for file in (
            _listed_images(bases, _place(bases, str(value)))
            if is_list
            else image_files(_folder(bases, path, split, value))
        )
    ]
    folder = Path(os.path.commonpath([file.parent for file in files]))
    return SplitFiles(split, path, (folder,), "YOLO", tuple(dict.fromkeys(files)))


def _listed_images(bases: Sequence[Path], listing: Path) -> Iterator[Path]:
    """The images in a text file with one path a line; tools write other folders before those of the dataset."""
    root = bases[-1]
    if not listing.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{listing}: the list of images leads out of {root}. Name a file inside it.")
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: can't be read ({error}). Replace the file.") from error
    for line in lines:
        file = next((one for one in _places(bases, line) if one.is_file()), None)
        if file is None or not file.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{listing}: the image {line!r} isn't in {root}. Add it, or correct the line.")
        yield file
    if not lines:
        raise DataError(f"{listing}: expected the path of an image in each line, found none. Add the images.")


def _place(bases: Sequence[Path], value: str) -> Path:
    """The first of `_places` that exists; without one, the path as it is written, below the last base if relative."""
    found = (place for place in _places(bases, value) if place.exists())
    return next(found, bases[-1] / (value if PureWindowsPath(value).anchor else Path(*_parts(value))))


def _places(bases: Sequence[Path], value: str) -> Iterator[Path]:
    """The places below the folders `bases` that a path of a data.yaml or of a list may mean, the most likely first.

    Where its first folder isn't in the dataset, it may begin with folders of another machine: then its endings may be
    meant, the longest first. They keep the folder that is named after a split, or `images` if there is none.
    """
    parts, root = _parts(value), Path(os.path.abspath(bases[-1]))  # noqa: PTH100 (keeps links)
    is_absolute = PureWindowsPath(value).anchor != ""
    for folder in (root, root.resolve()):
        if is_absolute and Path(value).is_relative_to(folder):
            yield bases[-1] / Path(value).relative_to(folder)
    if not is_absolute:
        yield from (base.joinpath(*parts) for base in bases)
        if any((base / parts[0]).exists() for base in bases if parts):
            return
    of_split = any(map(split_of, parts[:-1]))
    for start in range(0 if is_absolute else 1, len(parts)):
        ending = parts[start:]
        if any(map(split_of, ending)) if of_split else len(ending) > 1 and "images" in ending:
            yield from (base.joinpath(*ending) for base in bases)


def _parts(value: str) -> tuple[str, ...]:
    """The parts of a path without its drive and Roboflow's leading ../."""
    path = PureWindowsPath(value)
    return tuple(dropwhile("..".__eq__, path.relative_to(path.anchor).parts))


class BoundedLoader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, without aliases of lists and mappings: a few lines of them can stand for billions."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's. Raises YAMLError at such an alias."""
        is_alias, event = self.check_event(yaml.AliasEvent), self.peek_event()
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, f"the alias *{event.anchor} is of a list or mapping")
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML file as plain values; tags that would construct objects are rejected.

    Raises:
        DataError: it isn't readable YAML with a mapping
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), BoundedLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: can't be read as YAML ({error}). Correct the file.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected names and image folders, got a {type(content).__name__}. Correct the file.")
    return content


def _folder(bases: Sequence[Path], path: Path, split: str, value: object) -> Path:
    """An image folder of a split, which is below the dataset folder, the last of `bases`."""
    if not isinstance(value, str) or value.endswith(".txt"):
        raise DataError(f"{path}: expected an image folder for {split!r}, got {value!r:.60}. Name one folder.")
    root, found = bases[-1], _place(bases, value)
    below = found.relative_to(root).parts if found.is_relative_to(root) else ()
    if "images" not in map(str.lower, below):
        found = next(iter(named_folders(found, ("images",))), found)
    if not found.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{path}: {value!r} of {split!r} leads out of {root}. Name a folder inside it.")
    if not found.is_dir():
        without = " or remove the line: a fifth of the training images is then held out" if split == "valid" else ""
        raise DataError(f"{path}: the image folder {found} of {split!r} doesn't exist. Correct its path{without}.")
    return found


def read_yolo(files: SplitFiles, report: Report = raise_problem) -> FolderSplit:
    """Read and check one split; image and annotation ids count from 1 in the order of the file names.

    Raises:
        DataError: no class names, no images, or an invalid label; the message names file, line and remedy
    """
    names, folder = _class_names(files.annotations), Path(os.path.commonpath(files.image_folders))
    labels, pairs = label_folder(folder, files.annotations.parent), _images_and_labels(files)
    if not pairs:
        raise EmptySplitError(f"{folder}: found no images. Add images, or remove the split from {files.annotations}.")
    images: list[Entry] = []
    groups: dict[int, list[Entry]] = {}
    left_out: list[int] = []
    number = 0
    _check_outlines(labels, [label for _, label in pairs])
    for path, label in pairs:
        image = _image(path, folder, labels, len(images) + 1, files.exif_frame, report)
        if image is not None:
            images.append(image)
            groups[image["id"]] = []
        for category, fractions in _label_objects(label, names, report, labels):
            number += 1
            if image is None:
                left_out.append(number)
                continue
            sides = image["width"], image["height"]
            polygon = [fraction * sides[k % 2] for k, fraction in enumerate(fractions)]
            entry = {"id": number, "image_id": image["id"], "category_id": category, "segmentation": [polygon]}
            groups[image["id"]].append(pack_polygons(entry))
    if not images:
        raise DataError(f"{folder}: found no usable image. Replace the images, or remove the split.")
    return FolderSplit(
        str(labels), tuple(images), groups, names, folder, follow_links=files.follow_links, left_out=left_out
    )


def _image(path: Path, folder: Path, labels: Path, image_id: int, frame: ExifFrame, report: Report) -> Entry | None:
    name = path.relative_to(folder).as_posix()
    if not is_text(name):
        message = f"{folder}: the name of {name!r} isn't UTF-8. Rename the file."
        report("bad-image", labels, [rle.brief(name)], message)
        return None
    try:
        height, width = size_in_frame(path, f"image {image_id} ({path})", frame, str(labels), report)
    except ImageError as error:
        report("bad-image", labels, [name], str(error))
        return None
    return {"id": image_id, "file_name": name, "height": height, "width": width}


def _class_names(path: Path) -> dict[int, str]:
    """Names by number, of a data.yaml or of a classes.txt with one name a line."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
            return dict(enumerate(line.strip() for line in lines))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: can't be read ({error}). Replace the file.") from error
    names = read_yaml(path).get("names")
    given = dict(enumerate(names)) if isinstance(names, list) else names if isinstance(names, dict) else {}
    by_class = {int(key) if re.fullmatch("[0-9]{1,9}", str(key)) else None: name for key, name in given.items()}
    if not by_class or None in by_class or len(by_class) < len(given):
        raise DataError(f"{path}: expected `names` as a list of class names, got {names!r:.60}. Add the names.")
    return {key: str(name) for key, name in by_class.items() if key is not None}


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, in the order of their paths, without hidden ones."""
    return files_below(folder, SUFFIXES)


def label_folder(images: Path, root: Path) -> Path:
    """The label folder of an image folder: YOLO replaces the last `images` of the path below the root by `labels`.

    Where there is no such folder, that of an earlier `images` is taken, as CVAT writes it.
    """
    parts = images.relative_to(root).parts if images.is_relative_to(root) else ()
    places = [place for place, part in enumerate(parts) if part.lower() == "images"][::-1]
    for place in places:
        for labels in named_folders(root.joinpath(*parts[:place]), ("labels",)):
            if (found := labels.joinpath(*parts[place + 1 :])).is_dir():
                return found
    exact = next((place for place in places if parts[place] == "images"), None)
    return images if exact is None else root.joinpath(*parts[:exact], "labels", *parts[exact + 1 :])


def _images_and_labels(files: SplitFiles) -> list[tuple[Path, Path]]:
    """The images of a split, each with the path of its label file, which may not exist."""
    images = files.files or [path for folder in files.image_folders for path in image_files(folder)]
    root, unique = files.annotations.parent, dict.fromkeys(images)
    labels = {folder: label_folder(folder, root) for folder in dict.fromkeys(path.parent for path in unique)}
    return [(path, (labels[path.parent] / path.name).with_suffix(".txt")) for path in unique]


def _check_outlines(labels: Path, paths: Sequence[Path]) -> None:
    """Raise DataError if all lines of the label files are boxes."""
    boxes = 0
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
        except (OSError, UnicodeDecodeError):  # reported when its objects are read
            return
        lengths = [len(line.split()) for line in lines if line.strip()]
        if set(lengths) - {5}:
            return
        boxes += len(lengths)
    if boxes:
        raise EmptySplitError(
            f"{labels}: each line is a class and a box of four numbers, in all {boxes} lines: these are boxes only."
            f" {ADD_OUTLINES}."
        )


def yolo_contents(files: SplitFiles) -> Iterator[bytes]:
    """All content that the rows depend on: data.yaml, names and states of the images, and the labels."""
    yield files.annotations.read_bytes()
    for path, label in _images_and_labels(files):
        yield os.fsencode(f"{path} {file_state(path)}")
        yield label.read_bytes() if label.is_file() else b""


def _label_objects(
    label: Path, names: dict[int, str], report: Report, labels: Path
) -> Iterator[tuple[int, list[float]]]:
    """(class, [x, y, x, y, ...] as fractions) of each valid line; an image without a label file has no objects."""
    name = printable(label.name)
    try:
        lines = label.read_text(encoding="utf-8-sig").splitlines() if label.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        report("bad-annotation-entry", labels, [name], f"{printable(str(label))}: can't be read ({error}). Replace it.")
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{printable(str(label))}, line {number}"
        words = line.split()
        category, *fractions = map(_number, words)
        problem = _line_problem(words, category, fractions)
        if problem:
            report("bad-annotation-entry", labels, [f"{name}:{number}"], f"{where}: {problem}")
        elif int(category) not in names:
            message = f"{where}: class {int(category)} isn't among the {len(names)} names. Correct it, or add the name."
            report("unknown-category", labels, [f"{name}:{number}"], message)
        else:
            yield int(category), fractions


def _number(word: str) -> float:
    """The number that a word spells; NaN if it is not a number."""
    return float(word) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", word) else math.nan


def _line_problem(words: list[str], category: float, fractions: list[float]) -> str:
    """A message about an invalid line, from its words and their numbers; "" for a valid one."""
    if math.isnan(category) or category % 1 or category < 0:
        return f"expected a class number first, got {words[0][:40]!r}. Correct the line."
    if len(fractions) == 4:
        return "expected a polygon `class x y x y ...`, got a box of four numbers. Export it for segmentation."
    if len(fractions) < 6 or len(fractions) % 2:
        return f"expected at least three points x y, got {len(fractions)} numbers. Correct the line."
    unread = [word for word, value in zip(words[1:], fractions, strict=True) if math.isnan(value)]
    if unread:
        return f"expected numbers with a decimal point, such as 0.25, got {unread[0][:40]!r}. Correct the line."
    if not all(-_MARGIN <= value <= 1 + _MARGIN for value in fractions):
        wrong = next(value for value in fractions if not -_MARGIN <= value <= 1 + _MARGIN)
        return (
            f"expected fractions of the image's width and height, 0 to 1, got {wrong:g}."
            " Divide x by the width and y by the height."
        )
    return ""
