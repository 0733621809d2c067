"""One image with its annotations under the doctor's eye: what is doubtful about each object and about the file."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from m2f_trainer.data.coco_json import AnnotationFile, Entry
from m2f_trainer.data.geometry import fit
from m2f_trainer.data.problems import Report
from m2f_trainer.doctor.duplicates import BadImage, Look, look
from m2f_trainer.errors import DataError
from m2f_trainer.masks import rle
from m2f_trainer.masks.polygons import crosses_itself

_THREADS = 8  # Pillow decodes without the interpreter's lock
_HELD = 64  # images whose data is in memory at a time
_CELL = 4  # pixels a side of the input that one value of the mask map stands for
_PLAIN_MODES = ("L", "RGB", "1")


@dataclass(frozen=True)
class Settings:
    """What of a recipe the findings depend on."""

    image_height: int = 1024
    image_width: int = 1024
    num_queries: int = 100


@dataclass(frozen=True)
class Scan:
    """One usable image: its entry, the file it is of, what it is like, and its objects.

    An object is a dataset row's, with `mask_area` and `mask_box` (x, y, width, height) as its mask has them,
    and `flaws`, the kinds of findings about it.
    """

    entry: Entry
    file: AnnotationFile
    look: Look
    objects: list[Entry]

    @property
    def source(self) -> Entry:
        """Where the image's data is; of a Hub dataset it is the data, read at each call: all of it would fill memory"""
        return self.file.source(self.entry)

    @property
    def targets(self) -> list[Entry]:
        """The objects that are trained on."""
        return [one for one in self.objects if not one["iscrowd"]]

    def row(self) -> Entry:
        """The image as a dataset row."""
        size = {"height": self.entry["height"], "width": self.entry["width"]}
        return {"image": self.source, "image_id": self.entry["id"], **size, "objects": self.objects}


def scan_split(file: AnnotationFile, settings: Settings, report: Report) -> list[Scan]:
    """Every image that can be used, with all that is wrong or doubtful reported."""
    scans = []
    for entry, seen in _looks(file, report):
        where, number = f"image {entry['id']} ({entry['file_name']})", entry["id"]
        raw = {one["id"]: one for one in file.annotations.get(number, [])}
        objects = [_measured(one, raw[one["id"]], entry, settings, report, file) for one in file.objects(entry, report)]
        if isinstance(seen, BadImage):
            report(seen.kind, file.path, [number], seen.message)
            continue
        if seen.orientation != 1:
            report("exif-rotation", file.path, [number], f"{where}: EXIF orientation {seen.orientation}.", number)
        if seen.mode not in _PLAIN_MODES:
            report("converted-image", file.path, [number], f"{where}: stored in Pillow's mode {seen.mode}.", number)
        scan = Scan(entry, file, seen, objects)
        if len(scan.targets) > settings.num_queries:
            message = f"{where}: {len(scan.targets)} instances, but the model has {settings.num_queries} queries."
            report("many-instances", file.path, [number], message, number)
        scans.append(scan)
    return scans


def _looks(file: AnnotationFile, report: Report) -> Iterator[tuple[Entry, Look | BadImage]]:
    """Every image with a safe path, and what its data is like, read by several threads."""

    def read(found: tuple[Entry, Entry]) -> Look | BadImage:
        entry, source = found
        where = f"image {entry['id']} ({source.get('path') or entry['file_name']})"
        return look(source, where, (entry["height"], entry["width"]))

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(file.images), _HELD):
            safe: list[tuple[Entry, Entry]] = []
            for entry in file.images[start : start + _HELD]:
                try:
                    safe.append((entry, file.source(entry)))
                except DataError as error:
                    report("unsafe-path", file.path, [entry["id"]], str(error))
                    found = file.found_elsewhere(entry)
                    if found is not None:
                        renamed = {**entry, "file_name": found}
                        safe.append((renamed, file.source(renamed)))
            yield from ((entry, seen) for (entry, _), seen in zip(safe, pool.map(read, safe), strict=True))


def _measured(one: Entry, raw: Entry, image: Entry, settings: Settings, report: Report, file: AnnotationFile) -> Entry:
    """The object with its mask's own area and box, its doubts reported."""
    runs = rle.read_runs(one["counts"], image["height"], image["width"])
    x0, y0, x1, y1 = rle.box_of(runs, image["height"])
    measured = {**one, "mask_area": rle.area(runs), "mask_box": [x0, y0, x1 - x0, y1 - y0], "flaws": []}
    for kind, what in _doubts(measured, raw, image, settings):
        report(kind, file.path, [one["id"]], f"{file.place(one, image)}: {what}.", image["id"])
        measured["flaws"].append(kind)
    return measured


def _doubts(one: Entry, raw: Entry, image: Entry, settings: Settings) -> Iterator[tuple[str, str]]:
    """Kinds of findings about one object, with what was seen."""
    if not one["mask_area"]:
        yield "empty-mask", "no pixel of it lies in the image"
        return
    box, area, size = one["bbox"], one["area"], one["mask_box"][2:]
    if not boxes_agree(box, one["mask_box"]):
        yield "box-mismatch", f"`bbox` {_round(box)}, but its mask spans {one['mask_box']}"
    if abs(area - one["mask_area"]) > 10 + sum(size) + 0.2 * one["mask_area"]:
        yield "area-mismatch", f"`area` {area:g}, but its mask has {one['mask_area']} pixels"
    original = (image["height"], image["width"])
    scale = fit(original, (settings.image_height, settings.image_width)).resized[0] / image["height"]
    if not one["iscrowd"] and min(size) * scale < _CELL:
        at = f"{settings.image_width}x{settings.image_height}"
        yield "tiny-object", f"{size[0]}x{size[1]} pixels, {size[0] * scale:.1f}x{size[1] * scale:.1f} at {at}"
    segmentation, attributes = raw.get("segmentation"), raw.get("attributes")
    if isinstance(segmentation, list) and any(crosses_itself(part) for part in segmentation):
        yield "self-intersection", "two edges of its polygon cross"
    if one["iscrowd"] and isinstance(attributes, dict) and "occluded" in attributes:
        yield "brush-crowd", "a crowd region of CVAT's making"


def boxes_agree(box: Sequence[float], other: Sequence[float]) -> bool:
    """Whether no side of two boxes (x, y, width, height) is off by more than 3 pixels or a tenth of the box."""
    slack_x, slack_y = (3 + 0.1 * max(box[k], other[k]) for k in (2, 3))
    left, top = abs(box[0] - other[0]), abs(box[1] - other[1])
    right, bottom = abs(box[0] + box[2] - other[0] - other[2]), abs(box[1] + box[3] - other[1] - other[3])
    return max(left, right) <= slack_x and max(top, bottom) <= slack_y


def _round(box: Sequence[float]) -> list[float]:
    return [round(value, 1) for value in box]
