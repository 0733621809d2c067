"""Inspect every image of a split with its annotations, and report errors and doubtful cases."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from m2f_trainer.config.arguments import ExifFrame
from m2f_trainer.data.images import FEWEST_LEVELS
from m2f_trainer.data.problems import Report, kind_of
from m2f_trainer.data.splits import Entry, FolderSplit, SplitAnnotations, is_brush_crowd
from m2f_trainer.doctor.duplicates import ImageFacts, read_facts
from m2f_trainer.errors import DataError, ImageError
from m2f_trainer.masks.polygons import crosses_itself
from m2f_trainer.masks.rle import areas

_THREADS = 8  # Pillow decodes without Python's global lock
_IMAGES_AT_ONCE = 64  # whose data is in memory
_USUAL_MODES = ("L", "RGB", "1")


@dataclass(frozen=True)
class Settings:
    """The recipe's fields that findings depend on.

    Sizes and queries that are None are those that `m2f train` would choose (see `model_input`).
    """

    image_height: int | None = None
    image_width: int | None = None
    num_queries: int | None = None
    exif_frame: ExifFrame = "auto"
    pixel_range: str = "auto"
    follow_links: bool = False
    tile_size: int | None = None


@dataclass(frozen=True)
class Scan:
    """One usable image: its entry, the split it belongs to, facts of its file, and its objects.

    An object is that of a dataset row, with `mask_area` and `mask_box` (x, y, width, height) measured from its mask,
    and `findings`, the kinds of findings about it.
    """

    entry: Entry
    split: SplitAnnotations
    facts: ImageFacts
    objects: list[Entry]

    @property
    def source(self) -> Entry:
        """The image's data. Of a Hub dataset it is read at each call, because all images would fill the memory."""
        return self.split.source(self.entry)

    @property
    def targets(self) -> list[Entry]:
        """The objects to train on: all but crowd regions."""
        return [one for one in self.objects if not one["iscrowd"]]

    def row(self) -> Entry:
        """The image as a dataset row."""
        size = {"height": self.entry["height"], "width": self.entry["width"]}
        how = self.split.reading.columns()
        return {"image": self.source, "image_id": self.entry["id"], **size, **how, "objects": self.objects}


def scan_split(split: SplitAnnotations, report: Report, advance: Callable[[], object] = lambda: None) -> list[Scan]:
    """Every usable image; all problems of images and annotations are reported. `advance` is called for each image.

    Those that depend on the model are left to `model_input.report_misfits`.
    """
    scans = []
    for entry, facts in _read_images(split, report):
        advance()
        image_id, where = entry["id"], f"image {entry['id']} ({entry['file_name']})"
        raw = {one["id"]: one for one in split.annotations.get(image_id, [])}
        objects = _measured(split.objects(entry, report), entry)
        for one in objects:
            for kind, what in _object_findings(one, raw[one["id"]]):
                report(kind, split.name, [one["id"]], f"{split.annotation_name(one, entry)}: {what}.", image_id)
                one["findings"].append(kind)
            if is_brush_crowd(raw[one["id"]]):  # reported when its mask was read
                one["findings"].append("brush-crowd")
        _report_repeated_objects(objects, entry, report, split)
        if isinstance(facts, ImageError):
            report(kind_of(facts), split.name, [image_id], str(facts))
            continue
        if facts.turned:
            message = f"{where}: turned by its EXIF orientation, as its annotations are."
            report("turned-image", split.name, [image_id], message, image_id)
        elif facts.orientation != 1:
            message = f"{where}: EXIF orientation {facts.orientation}."
            report("exif-rotation", split.name, [image_id], message, image_id)
        if facts.mode not in _USUAL_MODES:
            message = f"{where}: stored in Pillow's mode {facts.mode}."
            report("converted-image", split.name, [image_id], message, image_id)
        if facts.levels is not None and facts.levels < FEWEST_LEVELS <= facts.values:
            message = f"{where}: of at least {facts.values} different values, {facts.levels} grey levels are left."
            report("few-levels", split.name, [image_id], message, image_id)
        scans.append(Scan(entry, split, facts, objects))
    return scans


def _read_images(split: SplitAnnotations, report: Report) -> Iterator[tuple[Entry, ImageFacts | ImageError]]:
    """Every image with a safe path, and the facts of its file, read by several threads."""

    def read(image: tuple[Entry, Entry]) -> ImageFacts | ImageError:
        entry, source = image
        where = f"image {entry['id']} ({source.get('path') or entry['file_name']})"
        try:
            return read_facts(source, where, (entry["height"], entry["width"]), split.reading)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(split.images), _IMAGES_AT_ONCE):
            safe: list[tuple[Entry, Entry]] = []
            for entry in split.images[start : start + _IMAGES_AT_ONCE]:
                try:
                    safe.append((entry, split.source(entry)))
                except DataError as error:
                    report("unsafe-path", split.name, [entry["id"]], str(error))
                    found = split.right_names.get(entry["id"]) if isinstance(split, FolderSplit) else None
                    if found is not None:
                        renamed = {**entry, "file_name": found}
                        safe.append((renamed, split.source(renamed)))
            yield from ((entry, facts) for (entry, _), facts in zip(safe, pool.map(read, safe), strict=True))


def _measured(objects: Sequence[Entry], image: Entry) -> list[Entry]:
    """The objects with area and box of their masks, which are valid RLEs, and an empty list for their findings."""
    if not objects:
        return []
    encoded = [{"size": [image["height"], image["width"]], "counts": one["counts"]} for one in objects]
    boxes = np.asarray(coco_mask.toBbox(encoded)).astype(int).tolist()
    return [
        {**one, "mask_area": area, "mask_box": box, "findings": []}
        for one, area, box in zip(objects, areas(encoded), boxes, strict=True)
    ]


def _report_repeated_objects(objects: list[Entry], image: Entry, report: Report, split: SplitAnnotations) -> None:
    """Report objects that have the same mask as another object of the image."""
    first_of: dict[tuple[str, bool], dict[int, int]] = {}  # mask and crowd flag -> category id -> annotation id
    for one in objects:
        if not one["mask_area"]:
            continue
        first = first_of.setdefault((one["counts"], one["iscrowd"]), {})
        where = split.annotation_name(one, image)
        if one["category_id"] in first:
            message = f"{where}: annotation {first[one['category_id']]} has the same mask and class."
            report("duplicate-object", split.name, [one["id"]], message, image["id"])
            continue
        for category, other in list(first.items())[:1]:
            names = f"{split.categories.get(category)!r}, this one {split.categories.get(one['category_id'])!r}"
            message = f"{where}: annotation {other} has the same mask and is {names}."
            report("object-of-two-classes", split.name, [other, one["id"]], message, image["id"])
        first[one["category_id"]] = one["id"]


def _object_findings(one: Entry, raw: Entry) -> Iterator[tuple[str, str]]:
    """Kinds of findings about one object, each with its description."""
    if not one["mask_area"]:
        yield "empty-mask", "no pixel of it lies inside the image"
        return
    box, area, size = one["bbox"], one["area"], one["mask_box"][2:]
    if not boxes_agree(box, one["mask_box"]):
        yield "box-mismatch", f"`bbox` {[round(value, 1) for value in box]}, but its mask spans {one['mask_box']}"
    if abs(area - one["mask_area"]) > 10 + sum(size) + 0.2 * one["mask_area"]:
        yield "area-mismatch", f"`area` {area:g}, but its mask has {one['mask_area']} pixels"
    segmentation = raw.get("segmentation")
    if isinstance(segmentation, list) and any(crosses_itself(part) for part in segmentation):
        yield "self-intersection", "two edges of its polygon cross"


def boxes_agree(box: Sequence[float], other: Sequence[float]) -> bool:
    """Whether no side of two boxes (x, y, width, height) differs by more than 3 pixels plus a tenth of the box."""
    tolerance_x, tolerance_y = (3 + 0.1 * max(box[k], other[k]) for k in (2, 3))
    left, top = abs(box[0] - other[0]), abs(box[1] - other[1])
    right, bottom = abs(box[0] + box[2] - other[0] - other[2]), abs(box[1] + box[3] - other[1] - other[3])
    return max(left, right) <= tolerance_x and max(top, bottom) <= tolerance_y
