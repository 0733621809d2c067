"""Read labelme folders: one JSON file for each image with `shapes`, `imagePath`, `imageHeight` and `imageWidth`.

Shapes become objects as in labelme's own converter (labelme/examples/instance_segmentation/labelme2coco.py): polygons,
rectangles, circles and masks are areas; shapes with the same label and `group_id` are one object. Rectangles of four
corners, as newer versions and X-AnyLabeling write them, are polygons. An image without a file is read from `imageData`.
The objects of several JSON files that name one image belong to that image.
"""

import base64
import binascii
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from m2f_trainer.data.files import files_below, kind_of_json
from m2f_trainer.data.image_names import ImageNames
from m2f_trainer.data.layouts import SplitFiles, by_split
from m2f_trainer.data.normalize import is_text
from m2f_trainer.data.problems import Report, listed, raise_problem
from m2f_trainer.data.reading import size_in_frame
from m2f_trainer.data.splits import Entry, FolderSplit, ImageEntries
from m2f_trainer.errors import DataError, ImageError, MaskError
from m2f_trainer.masks import segmentation as masks
from m2f_trainer.masks.rle import brief, max_pixels

_LABEL = re.compile(rb'"label"\s*:\s*("(?:[^"\\]|\\.)*")')
_WITHOUT_AREA = ("point", "points", "line", "linestrip")
_FOUR_CORNERS = ("rotation", "oriented_rectangle", "quadrilateral")
_LARGEST = 1e6  # pixels; a coordinate beyond is a mistake
_MIN_CORNERS = 12  # of a circle; larger circles have as many as labelme gives them


@dataclass(frozen=True)
class LabelmeSplit(FolderSplit):
    """A split of which some images are inside their annotation files: `inside` has these files, by image id."""

    inside: Mapping[int, Path] = field(default_factory=dict)

    def source(self, image: Entry) -> Entry:
        """As of the other formats. An image inside its annotation file is read anew each time. Raises DataError."""
        path = self.inside.get(image["id"])
        return super().source(image) if path is None else image_inside(path)


def image_inside(path: Path) -> Entry:
    """The image that an annotation file holds as `imageData`, as `datasets.Image` stores it. Raises ImageError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: it can no longer be read ({error}). Restore it, or remove it.") from error
    return {"path": str(path), "bytes": _decoded(content, path)}


def _decoded(content: Mapping[str, Any], path: Path) -> bytes:
    """The bytes of the image in an annotation file. Raises ImageError."""
    try:
        return base64.b64decode(content["imageData"])
    except (ValueError, TypeError, KeyError) as error:
        raise ImageError(
            f"{path}: expected the image in base64 as `imageData` ({error}). Add the image file, or remove {path.name}."
        ) from error


def find_labelme(root: Path) -> tuple[SplitFiles, ...]:
    """The splits of a folder with labelme files: by the folders that they are in, such as `train`, or one split.

    Raises:
        DataError: some files are in folders of splits and some are not
    """
    files = [path for path in files_below(root, (".json",)) if kind_of_json(path) == "labelme"]
    classes = tuple(sorted({name for path in files for name in _labels(path)}))
    return by_split(root, files, "labelme", classes)


def _labels(path: Path) -> Iterator[str]:
    """The labels in a file, as they are written in it."""
    for text in _LABEL.findall(path.read_bytes()):
        try:
            yield json.loads(text)
        except ValueError:  # reported when the file is read
            continue


def read_labelme(files: SplitFiles, report: Report = raise_problem) -> LabelmeSplit:
    """Read and check one split; image and annotation ids count from 1 in the order of the file names.

    Raises:
        DataError: no usable file, or an invalid one; the message names file, shape and remedy
    """
    folder, name = files.image_folders[0], str(files.annotations)
    names = dict(enumerate(files.classes, start=1))
    ids = {label: number for number, label in names.items()}
    places = ImageNames([folder], files.annotations, files.split, None, files.other_splits, files.follow_links)
    entries = ImageEntries(name, report)
    groups: dict[int, list[Entry]] = {}
    inside: dict[int, Path] = {}
    others: dict[Path, Path] = {}
    left_out: list[int] = []
    number = 0
    for path in files.files:
        content = _read(path, name, report)
        if content is None:
            continue
        image = _image(content, path, files, places, len(entries.images) + 1, inside, report)
        if image is not None:
            file = inside.get(image["id"], folder / image["file_name"])
            other = _other_image(path, file, entries.has(file), others)
            if other is not None:
                problem = f"{file} is also named by another file, and there is {other}, too. Correct `imagePath`."
                report("ambiguous-image", name, [path.name], f"{path}: {problem}")
                image = None
            else:
                image = entries.add(image, file, f"{path}: {image['file_name']}", path.name)
        image_id = None if image is None else image["id"]
        if image is not None:
            groups.setdefault(image["id"], [])
        for label, shapes in _objects(content["shapes"], path, partial(report, file=name, image=image_id)):
            try:
                segmentation = None if image is None else _segmentation(shapes, image, path)
            except MaskError as error:
                report("bad-mask", name, [f"{path.name}:{min(shapes)}"], str(error), image_id)
                continue
            number += 1
            if image is None:
                left_out.append(number)
                continue
            entry = {"id": number, "image_id": image["id"], "category_id": ids[label], "segmentation": segmentation}
            groups[image["id"]].append(entry)
    if not entries.images:
        raise DataError(f"{name}: found no usable labelme file. Correct the files, or remove the split.")
    images, links = tuple(entries.images), files.follow_links
    return LabelmeSplit(name, images, groups, names, folder, follow_links=links, left_out=left_out, inside=inside)


def _read(path: Path, name: str, report: Report) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        report("bad-image-entry", name, [path.name], f"{path}: can't be read ({error}). Replace the file.")
        return None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        message = f"{path}: expected a labelme file with a list under 'shapes'. Save it again with labelme."
        report("bad-image-entry", name, [path.name], message)
        return None
    return content


def _image(
    content: dict[str, Any],
    path: Path,
    files: SplitFiles,
    places: ImageNames,
    image_id: int,
    inside: dict[int, Path],
    report: Report,
) -> Entry | None:
    """The COCO entry of an image; None where it is reported. Adds an image inside its annotation file to `inside`."""
    folder, name, written = files.image_folders[0], str(files.annotations), content.get("imagePath")
    sides: list[Any] = [content.get("imageHeight"), content.get("imageWidth")]
    if not written or not is_text(written) or "\0" in written:
        message = f"{path}: expected the name of the image as `imagePath`, got {brief(written)}. Correct it."
        report("bad-image-entry", name, [path.name], message)
        return None
    file = _image_file(written, bool(content.get("imageData")), path, files, places, report)
    if file is None:
        return None
    if file == path:
        try:
            _decoded(content, path)
        except ImageError as error:
            report("bad-image", name, [path.name], str(error))
            return None
        report("image-inside", name, [path.name], f"{path}: found no file {written!r}; its `imageData` is read.")
        inside[image_id], file = path, _of_same_name(path, written)
    image = {"id": image_id, "file_name": os.path.relpath(file, folder), "height": sides[0], "width": sides[1]}
    if not all(type(side) is int and side > 0 for side in sides) or sides[0] * sides[1] > max_pixels():
        try:
            split = LabelmeSplit(name, (), {}, {}, folder, follow_links=files.follow_links, inside=inside)
            source = split.source(image)
            where = f"image {image_id} ({image['file_name']})"
            image["height"], image["width"] = size_in_frame(source, where, files.exif_frame, name, report)
        except ImageError as error:
            report("bad-image", name, [image["file_name"]], str(error))
            return None
        except DataError as error:
            report("unsafe-path", name, [image["file_name"]], str(error))
            return None
    return image


def _image_file(
    written: str, has_data: bool, beside: Path, files: SplitFiles, places: ImageNames, report: Report
) -> Path | None:
    """The path of an image: as written, relative to its annotation file, or that of the only image with its name;
    `beside`, the annotation file, where it alone holds the image, decodable or not; None where there is none inside the
    folder, or where several or only another split have it.
    """
    folder, name, base = files.image_folders[0], str(files.annotations), PureWindowsPath(written).name
    path = Path(os.path.normpath(beside.parent / written.replace("\\", "/")))
    absolute, around = (Path(os.path.abspath(one)) for one in (path, folder))  # noqa: PTH100 (keeps links)
    is_inside = absolute.is_relative_to(around)
    if is_inside and _is_file(path):
        return path
    choices, misplaced = places.find(base), places.find_in_other_splits(base)
    near = [one for one in (beside.parent / base, *[_of_same_name(beside, written)] * has_data) if _is_file(one)][:1]
    named = [one for one in choices if one not in near and one.parent.name == PureWindowsPath(written).parent.name]
    if near and not named:
        choices = near
    if len(choices) == 1:
        report("found-image", name, [beside.name], f"{beside}: {written!r} is read from {choices[0]}.")
        return choices[0]
    if has_data:
        return beside
    if choices:
        kind, problem = "ambiguous-image", f"{written!r} may be {listed(choices)}. Correct `imagePath`."
    elif misplaced:
        kind = "missing-image"
        problem = f"{written!r} is missing; {misplaced[0]} is in a folder of another split. Add the image."
    elif not is_inside:
        kind, both = "unsafe-path", around.parent
        advice = f"Name {both}, which holds both, or copy" if absolute.is_relative_to(both) else "Copy"
        problem = f"its `imagePath` {written!r} leads out of {folder}. {advice} the images into {folder}."
    else:
        return path
    report(kind, name, [beside.name], f"{beside}: {problem}")
    return None


def _other_image(path: Path, file: Path, is_repeated: bool, others: dict[Path, Path]) -> Path | None:
    """The image that an annotation file, or the former one of the same image, may show instead of the image `file` that
    it names: the one of its own name. Such a file may be a copy whose `imagePath` was not changed.

    None where `file` is named for the first time, which is noted in `others`.
    """
    own = _of_same_name(path, str(file))
    if path != file and os.path.normpath(own) != os.path.normpath(file) and _is_file(own):
        others.setdefault(file, own)
    return others.get(file) if is_repeated else None


def _of_same_name(path: Path, written: str) -> Path:
    """The image file of an annotation file's own name, with the suffix of its `imagePath`."""
    return path.with_suffix(PureWindowsPath(written).suffix)


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 (False, not an error, for a name that is too long)


def _objects(shapes: Sequence[Any], path: Path, report: Any) -> Iterator[tuple[str, dict[int, Entry]]]:
    """(label, shapes by their number) of each object of a file."""
    groups: dict[tuple[str, object], dict[int, Entry]] = {}
    left_out = []
    for number, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not is_text(shape.get("label")) or not _are_points(shape.get("points")):
            message = (
                f"{path}, shape {number}: expected a `label` and `points` as pairs of numbers. Correct or remove it."
            )
            report("bad-annotation-entry", ids=[f"{path.name}:{number}"], message=message)
        elif shape.get("shape_type") in _WITHOUT_AREA:
            left_out.append(number)
        else:
            group = shape.get("group_id")
            key = ("alone", number) if group is None else ("group", str(group))
            groups.setdefault((shape["label"], key), {})[number] = shape
    if left_out:
        message = f"{path}: shapes {listed(left_out)} are points or lines, which have no area, and are left out."
        report("no-area", ids=[f"{path.name}:{number}" for number in left_out], message=message)
    for (label, _), some in groups.items():
        yield label, some


def _are_points(points: object) -> bool:
    return isinstance(points, list) and all(
        isinstance(point, list) and len(point) == 2 and all(_is_coordinate(value) for value in point)
        for point in points
    )


def _is_coordinate(value: object) -> bool:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST  # type: ignore[operator]


def _segmentation(shapes: Mapping[int, Entry], image: Entry, path: Path) -> Any:
    """One segmentation of all shapes of an object: polygons, or one RLE. Raises MaskError."""
    places = [f"{path}, shape {number}" for number in shapes]
    parts = [_part(shape, image, where) for shape, where in zip(shapes.values(), places, strict=True)]
    if all(isinstance(part, list) for part in parts):
        return parts
    height, width = image["height"], image["width"]
    bitmap = np.zeros((height, width), bool)
    for part, where in zip(parts, places, strict=True):
        counts = masks.to_counts([part] if isinstance(part, list) else part, height, width, where)
        bitmap |= masks.decode(counts, height, width) != 0
    return {"size": [height, width], "counts": masks.encode(bitmap)}


def _part(shape: Entry, image: Entry, where: str) -> list[float] | Entry:
    """The polygon of a shape, or the RLE of a mask. Raises MaskError."""
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind in _FOUR_CORNERS and len(points) != 4:
        raise MaskError(f"{where}: expected four corners of a {kind}, got {len(points)}. Correct or remove it.")
    if kind in ("polygon", *_FOUR_CORNERS) or (kind == "rectangle" and len(points) == 4):
        return [float(value) for point in points for value in point]
    if kind in ("rectangle", "circle", "mask") and len(points) != 2:
        raise MaskError(f"{where}: expected two points of a {kind}, got {len(points)}. Correct or remove it.")
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return [float(value) for value in (x0, y0, x1, y0, x1, y1, x0, y1)]
    if kind == "circle":
        return _circle(*points)
    if kind == "mask":
        return _mask(shape, image, where)
    raise MaskError(
        f"{where}: expected a polygon, rectangle, circle or mask, got the shape_type {brief(kind)}. Draw a polygon."
    )


def _circle(center: Sequence[float], edge: Sequence[float]) -> list[float]:
    """A polygon that stays within a pixel of the circle."""
    radius = math.dist(center, edge)
    corners = max(_MIN_CORNERS, int(math.pi / math.acos(max(1 - 1 / radius, -1.0)))) if radius else 3
    angles = [2 * math.pi * k / corners for k in range(corners)]
    return [
        value
        for angle in angles
        for value in (center[0] + radius * math.cos(angle), center[1] + radius * math.sin(angle))
    ]


def _mask(shape: dict[str, Any], image: Entry, where: str) -> Entry:
    """The RLE of a mask that is stored as a PNG of its box."""
    (x0, y0), (x1, y1) = ([round(value) for value in point] for point in shape["points"])
    height, width = image["height"], image["width"]
    try:
        with Image.open(io.BytesIO(base64.b64decode(str(shape.get("mask")), validate=True)), formats=("PNG",)) as png:
            size = png.size
            inside = min(x0, y0) >= 0 and x0 + size[0] <= width and y0 + size[1] <= height
            if size != (x1 - x0 + 1, y1 - y0 + 1) or not inside:
                raise MaskError(
                    f"{where}: expected a mask of the size of its box inside the image of {width}x{height} pixels, got"
                    f" {size[0]}x{size[1]} at ({x0}, {y0}) to ({x1}, {y1}). Draw it again."
                )
            part = np.asarray(png.convert("L"))
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MaskError(f"{where}: expected the mask as a PNG in base64 ({error}). Draw it again.") from error
    bitmap = np.zeros((height, width), np.uint8)
    bitmap[y0 : y0 + size[1], x0 : x0 + size[0]] = part != 0
    return {"size": [height, width], "counts": masks.encode(bitmap)}
