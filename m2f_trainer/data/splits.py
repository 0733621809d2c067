"""One split of a dataset: its checked annotations, and the rows that are built of them."""

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np

from m2f_trainer.data.image_names import LINK_ADVICE
from m2f_trainer.data.normalize import flat_polygons, has_no_outline, number, usual_box, usual_segmentation
from m2f_trainer.data.problems import Key, Report, raise_problem
from m2f_trainer.data.reading import Photo, Reading
from m2f_trainer.errors import DataError, MaskError
from m2f_trainer.masks import rle
from m2f_trainer.masks import segmentation as masks

Entry: TypeAlias = dict[str, Any]
"""A JSON object of an annotation file, or a value of a dataset row."""

_NUMBERS = {int, float}


@dataclass(frozen=True)
class SplitAnnotations(ABC):
    """The checked annotations of one split: ids are unique integers, every annotation has an image and a category.

    Attributes:
        name: the split in messages and findings: its annotation file, its folder of labels, or the Hub dataset
        images: COCO image entries, in the file's order
        annotations: COCO annotation entries by image id
        categories: names by category id, whether used or not
        left_out: ids of the annotations of images that were reported and left out
        reading: how its images are read
    """

    name: str
    images: tuple[Entry, ...]
    annotations: Mapping[int, list[Entry]]
    categories: Mapping[int, str]
    left_out: Sequence[int] = field(default=(), kw_only=True)
    reading: Reading = field(default=Reading(), kw_only=True)

    @abstractmethod
    def source(self, image: Entry) -> Entry:
        """The image's data as `datasets.Image` stores it: `{"path", "bytes"}`.

        Raises:
            DataError: the file name leads out of the dataset folder
        """

    def used_categories(self) -> set[int]:
        """The ids of the categories with at least one annotation."""
        return {entry["category_id"] for group in self.annotations.values() for entry in group}

    def rows(self, report: Report = raise_problem) -> Iterator[Entry]:
        """The dataset rows, one per image, in the order of `images`.

        Raises:
            DataError: at the first row that can't be built
        """
        for image in self.images:
            yield {
                "image": self.source(image),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                **self.reading.columns(),
                "objects": self.objects(image, report),
            }

    def photos(self) -> Iterator[Photo]:
        """The image files."""
        for image in self.images:
            size, annotated = (image["height"], image["width"]), bool(self.annotations.get(image["id"]))
            source = partial(self.source, image)
            yield Photo(self.name, image["id"], image["file_name"], source, size, annotated)

    def objects(self, image: Entry, report: Report = raise_problem) -> list[Entry]:
        """The annotations of one image as a row's `objects`, each with its mask as a valid RLE."""
        found = (self._object(entry, image, report) for entry in self.annotations.get(image["id"], []))
        return [entry for entry in found if entry is not None]

    def _object(self, entry: Entry, image: Entry, report: Report) -> Entry | None:
        counts = self._counts(entry, image, report)
        if counts is None:
            return None
        if counts == _empty_counts(image["height"], image["width"]) and (reach := _reach(entry, image)):
            message = f"{self.full_name(entry, image)}: its outline lies outside the image, {reach}."
            report("outside-image", self.name, [entry["id"]], f"{message} {self._scale_hint}", image["id"])
            return None
        if is_brush_crowd(entry):
            message = (
                f"{self.full_name(entry, image)}: a crowd region exported by CVAT, which is excluded from training."
            )
            advice = "If it is one object, set its `iscrowd` to 0, as m2f check --fix does for all of them."
            report("brush-crowd", self.name, [entry["id"]], f"{message} {advice}", image["id"])
        box, area = self._box_and_area(entry, image, report)
        if box is None or area is None:
            runs = rle.read_runs(counts, image["height"], image["width"])
            x0, y0, x1, y1 = rle.box_of(runs, image["height"])
            box = [x0, y0, x1 - x0, y1 - y0] if box is None else box
            area = rle.area(runs) if area is None else area
        return {
            "id": entry["id"],
            "category_id": entry["category_id"],
            "bbox": [float(value) for value in box],
            "area": float(area),  # the file's own, which official COCO scores use
            "iscrowd": bool(entry.get("iscrowd", 0)),
            "counts": counts,
        }

    def _box_and_area(self, entry: Entry, image: Entry, report: Report) -> tuple[list[float] | None, float | None]:
        """The `bbox` and `area` of an annotation; None where it has none, or an invalid one, which is reported."""
        box, area = usual_box(entry.get("bbox")), number(entry.get("area"))
        area = None if area is not None and area < 0 else area
        problems = []
        if box is None and entry.get("bbox") not in (None, []):
            got = f"expected a `bbox` of four numbers x, y, width, height, got {str(entry['bbox'])[:60]}. Correct it."
            problems.append(("bad-box", got))
        elif box is not None and any(isinstance(side, str) for side in entry["bbox"]):
            problems.append(("unusual-number", f"bbox {str(entry['bbox'])[:60]}."))
        if area is None and entry.get("area") is not None:
            got = f"expected an `area` in pixels, got {rle.brief(entry['area'])}. Correct it or leave it out."
            problems.append(("bad-area", got))
        elif isinstance(entry.get("area"), str):
            problems.append(("unusual-number", f"area {entry['area']!r}."))
        for kind, problem in problems:
            report(kind, self.name, [entry["id"]], f"{self.full_name(entry, image)}: {problem}", image["id"])
        return box, area

    def _counts(self, entry: Entry, image: Entry, report: Report) -> str | None:
        segmentation, height, width = entry.get("segmentation"), image["height"], image["width"]
        try:
            return masks.to_counts(segmentation, height, width, "")
        except MaskError:
            pass  # tried again below with the annotation's name, which takes time to build
        name = self.full_name(entry, image)
        usual, kind = usual_segmentation(segmentation, height, width, entry.get("bbox")) or (segmentation, "")
        try:
            counts = masks.to_counts(usual, height, width, name)
        except MaskError as error:
            kind = "no-mask" if has_no_outline(segmentation) else "bad-mask"
            report(kind, self.name, [entry["id"]], str(error), image["id"])
            return None
        report(kind, self.name, [entry["id"]], f"{name}: {rle.brief(segmentation)}.", image["id"])
        entry["segmentation"] = usual
        return counts

    @cached_property
    def _scale_hint(self) -> str:
        """Advice for outlines outside of their images; if most are, the images were probably rescaled."""
        ratios = [
            max(right / image["width"], bottom / image["height"])
            for image in self.images
            for entry in self.annotations.get(image["id"], [])
            for _, _, right, bottom in _outline_boxes(entry)
        ]
        if sum(ratio > 1.05 for ratio in ratios) <= len(ratios) / 2:
            return "Correct the outline or the size of the image."
        return (
            "Most outlines reach beyond their images: the images seem to have been reduced after they were annotated,"
            f" to 1/{max(ratios):.3g} of their size or less. Divide all coordinates by that factor, or use the original"
            " images."
        )

    def full_name(self, entry: Entry, image: Entry) -> str:
        """An annotation in messages, with the split that it is in."""
        return f"{self.name}: {self.annotation_name(entry, image)}"

    def annotation_name(self, entry: Entry, image: Entry) -> str:
        """An annotation in messages."""
        return f"annotation {entry['id']} of image {image['id']} ({image['file_name']})"


def is_brush_crowd(entry: Entry) -> bool:
    """Whether an annotation is a crowd region that CVAT exported, as it does with objects drawn with its brush."""
    attributes = entry.get("attributes")
    return bool(entry.get("iscrowd")) and isinstance(attributes, dict) and "occluded" in attributes  # CVAT writes it


@lru_cache
def _empty_counts(height: int, width: int) -> str:
    """The RLE of a mask without a pixel."""
    return rle.write_counts(np.array([height * width]), height, width)


def _outline_boxes(entry: Entry) -> list[tuple[float, float, float, float]]:
    """The box of all polygons of an annotation as (left, top, right, bottom), in a list; none for other masks."""
    parts = flat_polygons(entry.get("segmentation")) or []
    across, down = [x for part in parts for x in part[::2]], [y for part in parts for y in part[1::2]]
    box = min(across, default=None), min(down, default=None), max(across, default=None), max(down, default=None)
    sides = [side for value in box if (side := number(value)) is not None]
    return [(sides[0], sides[1], sides[2], sides[3])] if len(sides) == 4 else []


def _reach(entry: Entry, image: Entry) -> str:
    """The extent of an annotation's polygons for messages; "" if they touch their image."""
    for left, top, right, bottom in _outline_boxes(entry):
        if right <= 0 or bottom <= 0 or left >= image["width"] or top >= image["height"]:
            size = f"{image['width']}x{image['height']}"
            return f"x {left:g} to {right:g} and y {top:g} to {bottom:g} in {size} pixels"
    return ""


@dataclass(frozen=True)
class FolderSplit(SplitAnnotations):
    """A split whose images are files in a folder, as in COCO and YOLO datasets.

    Attributes:
        folder: that of the images
        elsewhere: by image id, the paths of images in other folders of the dataset
        follow_links: whether links may lead out of the folder
        right_names: by image id, the names of files in the folder for names that lead out of it, as `--fix` writes them
    """

    folder: Path
    elsewhere: Mapping[int, Path] = field(default_factory=dict)
    follow_links: bool = False
    right_names: Mapping[int, str] = field(default_factory=dict)

    def source(self, image: Entry) -> Entry:
        """The path of the image file; the file itself may be missing."""
        name = image["file_name"]
        if image["id"] in self.elsewhere:
            return {"path": os.path.realpath(self.elsewhere[image["id"]]), "bytes": None}
        path = f"{self._root}/{name}"
        if not {"/", "\\", "\0"}.isdisjoint(name) or name in (".", "..") or os.path.islink(path):  # noqa: PTH114
            path = self._path_inside(image)
        return {"path": path, "bytes": None}

    def _path_inside(self, image: Entry) -> str:
        """The path of a file name with folders or links; the message names the right file name where it is known."""
        name = image["file_name"]
        try:
            where = f"{self.name}: image {image['id']} ({name})"
            return resolve_inside(self.folder, name, where, self.follow_links)
        except DataError as error:
            found = self.right_names.get(image["id"])
            if found is None:
                raise
            advice = f"The folder has a file of that name: write {found!r}, as m2f check --fix does."
            raise DataError(f"{error} {advice}") from None

    @cached_property
    def _root(self) -> str:
        return os.path.realpath(self.folder)


@dataclass
class ImageEntries:
    """The image entries of a split while it is read, one for each file: further entries of a file become its first.

    Attributes:
        name: the split in messages and findings
        images: the first entries, in the order in which they were added
    """

    name: str
    report: Report
    images: list[Entry] = field(default_factory=list)
    _by_path: dict[str, Entry] = field(default_factory=dict)

    def has(self, path: Path) -> bool:
        """Whether there is an entry of this file."""
        return os.path.normpath(path) in self._by_path

    def add(self, image: Entry, path: Path, where: str, key: Key) -> Entry | None:
        """The first entry of an image's file, which may be `image` itself; None where the two sizes differ.

        `where` is the entry in messages, `key` in findings.
        """
        first = self._by_path.setdefault(os.path.normpath(path), image)
        if first is image:
            self.images.append(image)
            return image
        message, sizes = f"{where} is the same file as image {first['id']}", [(first["width"], first["height"])]
        sizes.append((image["width"], image["height"]))
        if sizes[0] != sizes[1]:
            found = "{}x{} instead of {}x{} pixels".format(*sizes[1], *sizes[0])
            self.report("bad-image-entry", self.name, [key], f"{message} but has another size, {found}. Correct it.")
            return None
        self.report("merged-entries", self.name, [key], f"{message}, {first['file_name']}.")
        return first


def resolve_inside(folder: Path, name: str, where: str, follow_links: bool = False) -> str:
    """The path of a `file_name`, which must stay inside its image folder, also after links are followed.

    `follow_links`: links may lead out of it.

    Raises:
        DataError: an absolute path, `..`, a link out of the folder, a NUL, or Windows separators
    """
    if "\\" in name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(
            f"{where}: expected a `file_name` relative to {folder} with / between folders, without '..', got {name!r}."
            " Correct the file name."
        )
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))  # noqa: PTH118 (called for every image with folders in its name)
    if not follow_links and not path.startswith(root.rstrip("/") + "/"):
        raise DataError(
            f"{where}: `file_name` {name!r} leads out of {folder}, to {path}. Copy the file into the folder."
            f" {LINK_ADVICE}"
        )
    return path


def pack_polygons(entry: Entry) -> Entry:
    """The entry with well-formed polygons as arrays of float64, which take a quarter of the memory of lists."""
    parts = entry.get("segmentation")
    if type(parts) is list and all(type(part) is list and set(map(type, part)) <= _NUMBERS for part in parts):
        try:
            entry["segmentation"] = [array("d", part) for part in parts]
        except OverflowError:  # an integer beyond the range of float64; the polygon's check reports it
            return entry
    return entry
