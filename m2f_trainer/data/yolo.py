"""Read YOLO segmentation folders: a data.yaml with class names and image folders, and a folder of labels for each.

A label file is named as its image and has one line per object: `class x y x y ...`, as fractions of width and height.
"""

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from m2f_trainer.data.files import files_below, subfolders, visible
from m2f_trainer.data.images import SUFFIXES
from m2f_trainer.data.layouts import SplitFiles, split_of
from m2f_trainer.data.normalize import is_text
from m2f_trainer.data.problems import ADD_OUTLINES, Report, raise_problem
from m2f_trainer.data.reading import size_in_frame
from m2f_trainer.data.splits import Entry, FolderSplit
from m2f_trainer.errors import DataError, ImageError
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
    found = []
    for split, keys in (("train", ("train",)), ("valid", ("val", "valid")), ("test", ("test",))):
        value = next((content[key] for key in keys if content.get(key)), None)
        if value is None:
            continue
        if isinstance(value, str) and value.endswith(".txt") and _inside(root, value).is_file():
            found.append(_listed_images(root, path, split, _inside(root, value)))
        elif split != "test" or not isinstance(value, str) or _exists(root, value):
            found.append(SplitFiles(split, path, (_folder(root, path, split, value),), "YOLO"))
        else:
            logger.warning("%s: the test split %r doesn't exist and is left out", path, value)
    return tuple(found)


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


def _listed_images(root: Path, path: Path, split: str, listing: Path) -> SplitFiles:
    """A split whose images are listed in a text file, one path a line."""
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: can't be read ({error}). Replace the file.") from error
    files = []
    for line in lines:
        place = line.replace("\\", "/").rpartition("images/")  # tools write other folders before it
        candidates = (_inside(root, line), root / "images" / place[2])
        file = next((one for one in candidates if one.is_relative_to(root) and one.is_file()), None)
        if file is None or not file.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{listing}: the image {line!r} isn't in {root}. Add it, or correct the line.")
        files.append(file)
    if not files:
        raise DataError(f"{listing}: expected the path of an image in each line, found none. Add the images.")
    folder = Path(os.path.commonpath([file.parent for file in files]))
    return SplitFiles(split, path, (folder,), "YOLO", tuple(files))


def _inside(root: Path, value: str) -> Path:
    """A path of a data.yaml below `root`: the file's `path:` and Roboflow's leading ../ are ignored."""
    return root / re.sub(r"^(\.\./|\./)+", "", value.replace("\\", "/"))


def _exists(root: Path, value: str) -> bool:
    return _inside(root, value).exists()


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


def _folder(root: Path, path: Path, split: str, value: object) -> Path:
    """The image folder of a split, which is below `root`."""
    if not isinstance(value, str) or value.endswith(".txt"):
        raise DataError(f"{path}: expected an image folder for {split!r}, got {value!r:.60}. Name one folder.")
    inside = _inside(root, value)
    below = inside.relative_to(root).parts if inside.is_relative_to(root) else ()
    folder = inside if "images" in below else inside / "images"
    found = folder if folder.is_dir() else inside
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
    names, folder = _class_names(files.annotations), files.image_folders[0]
    labels = label_folder(folder, files.annotations.parent)
    images: list[Entry] = []
    groups: dict[int, list[Entry]] = {}
    number = 0
    _check_outlines(labels, [(labels / path.relative_to(folder)).with_suffix(".txt") for path in _images(files)])
    for path in _images(files):
        name, image_id = path.relative_to(folder).as_posix(), len(images) + 1
        if not is_text(name):
            report(
                "bad-image", labels, [rle.brief(name)], f"{folder}: the name of {name!r} isn't UTF-8. Rename the file."
            )
            continue
        try:
            where = f"image {image_id} ({path})"
            height, width = size_in_frame(path, where, files.exif_frame, str(labels), report)
        except ImageError as error:
            report("bad-image", labels, [name], str(error))
            continue
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        groups[image_id] = []
        for category, fractions in _label_objects((labels / name).with_suffix(".txt"), names, report, labels):
            number += 1
            polygon = [fraction * (height if k % 2 else width) for k, fraction in enumerate(fractions)]
            entry = {"id": number, "image_id": image_id, "category_id": category, "segmentation": [polygon]}
            groups[image_id].append(entry)
    if not images:
        raise DataError(f"{folder}: found no images. Add images, or remove the split from {files.annotations}.")
    return FolderSplit(str(labels), tuple(images), groups, names, folder, follow_links=files.follow_links)


def _class_names(path: Path) -> dict[int, str]:
    """Names by number, of a data.yaml or of a classes.txt with one name a line."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
            return dict(enumerate(line.strip() for line in lines))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: can't be read ({error}). Replace the file.") from error
    names = read_yaml(path).get("names")
    by_class = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(by_class, dict) or not by_class or not all(type(key) is int for key in by_class):
        raise DataError(f"{path}: expected `names` as a list of class names, got {names!r:.60}. Add the names.")
    return {key: str(name) for key, name in by_class.items()}


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, in the order of their paths, without hidden ones."""
    return files_below(folder, SUFFIXES)


def label_folder(images: Path, root: Path) -> Path:
    """The label folder of an image folder: YOLO replaces the last `images` of the path below the root by `labels`."""
    parts = list(images.relative_to(root).parts) if images.is_relative_to(root) else []
    if "images" not in parts:
        return images
    place = len(parts) - 1 - parts[::-1].index("images")
    return root.joinpath(*parts[:place], "labels", *parts[place + 1 :])


def _images(files: SplitFiles) -> Sequence[Path]:
    """The images of a split."""
    return files.files or image_files(files.image_folders[0])


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
        raise DataError(
            f"{labels}: each line is a class and a box of four numbers, in all {boxes} lines: these are boxes only."
            f" {ADD_OUTLINES}."
        )


def yolo_contents(files: SplitFiles) -> Iterator[bytes]:
    """All content that the rows depend on: data.yaml, names and file sizes of the images, and the labels."""
    yield files.annotations.read_bytes()
    folder = files.image_folders[0]
    labels = label_folder(folder, files.annotations.parent)
    for path in _images(files):
        yield os.fsencode(f"{path} {path.stat().st_size}")
        label = (labels / path.relative_to(folder)).with_suffix(".txt")
        yield label.read_bytes() if label.is_file() else b""


def _label_objects(
    label: Path, names: dict[int, str], report: Report, labels: Path
) -> Iterator[tuple[int, list[float]]]:
    """(class, [x, y, x, y, ...] as fractions) of each valid line; an image without a label file has no objects."""
    try:
        lines = label.read_text(encoding="utf-8-sig").splitlines() if label.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        report("bad-annotation-entry", labels, [label.name], f"{label}: can't be read ({error}). Replace the file.")
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{label}, line {number}"
        words = line.split()
        category, *fractions = map(_number, words)
        problem = _line_problem(words, category, fractions)
        if problem:
            report("bad-annotation-entry", labels, [f"{label.name}:{number}"], f"{where}: {problem}")
        elif int(category) not in names:
            message = f"{where}: class {int(category)} isn't among the {len(names)} names. Correct it, or add the name."
            report("unknown-category", labels, [f"{label.name}:{number}"], message)
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
