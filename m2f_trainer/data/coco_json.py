"""Read one COCO annotation file and check every id, reference and number before anything is built from it.

Every problem is passed to a `Report`. Unless the report raises, the faulty part is left out and reading continues.
"""

import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from m2f_trainer.config.arguments import ExifFrame
from m2f_trainer.data.files import file_parts, file_state
from m2f_trainer.data.image_names import (
    ImageNames,
    image_paths,
    is_address,
    is_inside,
    outermost,
    path_elsewhere,
    usual_name,
    without_server,
)
from m2f_trainer.data.layouts import SplitFiles
from m2f_trainer.data.normalize import LARGEST_ID, Ids, is_id, is_text, type_name, whole_number
from m2f_trainer.data.problems import Report, kind_of, listed, raise_problem
from m2f_trainer.data.reading import size_in_frame
from m2f_trainer.data.splits import Entry, FolderSplit, ImageEntries, pack_polygons
from m2f_trainer.errors import DataError, EmptySplitError, ImageError
from m2f_trainer.masks import rle


def read_annotations(files: SplitFiles, report: Report = raise_problem) -> FolderSplit:
    """Read and check the annotation file of one split.

    Raises:
        DataError: it isn't readable COCO; the message names the file, the ids and the remedy
    """
    path, name = files.annotations, str(files.annotations)
    content = _parse(path)
    if files.split == "test" and "annotations" not in content:
        report("test-without-annotations", name, [], f"{name}: its images have no annotations, so it has no score.")
        content = {"categories": [], **content, "annotations": []}
    images, entries, categories = (_list_of(content, key, name) for key in ("images", "annotations", "categories"))
    if not images:
        raise EmptySplitError(f"{name}: `images` is empty. Add images, or remove the split.")
    image_ids, category_ids = (Ids(one.get("id") for one in group) for group in (images, categories))
    images = _unique_images(_with_ids(images, image_ids, "image", name, report), name, report)
    located = _locate(images, files, report)
    sized = _sized(located.images, located.paths, files.exif_frame, name, report)
    images, first_entry = _merged(check_images(sized, name, report), located.paths, name, report)
    categories = _with_ids(categories, category_ids, "category", name, report)
    used = {category_ids.number_of(one.get("category_id")) for one in entries}
    names = _check_categories(categories, used, name, report)
    groups: dict[int, list[Entry]] = {image["id"]: [] for image in images}
    left_out: list[int] = []
    entries = _with_references(_with_annotation_ids(entries, name, report), image_ids, category_ids, name, report)
    for entry in _check_annotations(entries, name, report, images=image_ids.numbers, categories=names):
        image_id = first_entry.get(entry["image_id"], entry["image_id"])
        if image_id in groups:
            groups[image_id].append(entry if image_id == entry["image_id"] else {**entry, "image_id": image_id})
        else:
            left_out.append(entry["id"])
    elsewhere = {
        key: path for key, path in located.paths.items() if key in groups and not path.is_relative_to(located.folder)
    }
    return FolderSplit(
        name,
        tuple(images),
        groups,
        names,
        located.folder,
        elsewhere,
        files.follow_links,
        located.right_names,
        left_out=left_out,
    )


def coco_contents(files: SplitFiles) -> Iterator[bytes]:
    """Everything that the rows of a split depend on: the annotation file, and names and states of the images."""
    yield from file_parts(files.annotations)
    folders = [*files.image_folders, *([files.root] if files.root else [])]
    for path in sorted(path for folder in outermost(folders) for path in image_paths(folder, files.follow_links)):
        yield os.fsencode(f"{path} {file_state(path)}")


def _parse(path: Path) -> Mapping[str, Any]:
    collecting = gc.isenabled()
    gc.disable()  # none of the millions of new objects is garbage; searching them takes a fifth of the time
    try:
        content = json.loads(b"".join(file_parts(path)).decode("utf-8-sig"), object_hook=pack_polygons)
    except OSError as error:
        raise DataError(f"{path}: the annotation file can't be read ({error}). Check path and permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got another encoding ({error}). Save it as UTF-8.") from error
    except RecursionError as error:
        raise DataError(f"{path}: the JSON is nested too deeply to be COCO. Export it again.") from error
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON ({error}): the file is truncated or damaged. Export it again."
        ) from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a COCO object with images, annotations and categories, got a {type_name(content)}."
        )
    return content


def _list_of(content: Mapping[str, Any], key: str, name: str) -> list[Entry]:
    value = content.get(key)
    if not isinstance(value, list):
        found = (
            f"a {type_name(value)}"
            if key in content
            else f"only {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
        )
        raise DataError(f"{name}: expected a list under the key {key!r}, got {found}. Export it as COCO segmentation.")
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise DataError(
                f"{name}: expected objects in {key!r}, got a {type_name(entry)} at index {i}. Correct that entry."
            )
    return value


def check_images(images: list[Entry], name: str, report: Report) -> list[Entry]:
    """The image entries with a unique id, a file name and a size."""
    valid = []
    ids = Ids(image.get("id") for image in images)
    for image in _unique_images(_with_ids(images, ids, "image", name, report), name, report):
        file_name, where = image.get("file_name"), f"{name}: image {image['id']}"
        sides: list[Any] = [image.get("height"), image.get("width")]
        if not file_name or not is_text(file_name):
            problem = f"{where}: expected a `file_name`, got {rle.brief(file_name)}. Correct it."
        elif not all(type(side) is int and side > 0 for side in sides):
            found = " and ".join(map(rle.brief, sides))
            problem = f"{where} ({file_name}): expected whole numbers from 1 as `height` and `width`, got {found}."
            problem += " Correct them."
        elif sides[0] * sides[1] > rle.max_pixels():
            problem = (
                f"{where} ({file_name}): `height` and `width` are those of {sides[0] * sides[1]:,} pixels, more than"
                f" the limit of {rle.max_pixels():,}. Correct them if they are wrong, cut the image, or raise"
                " the limit with --max_pixels."
            )
        else:
            valid.append(image)
            continue
        report("bad-image-entry", name, [image["id"]], problem)
    return valid


@dataclass(frozen=True)
class _Located:
    """The image entries with their actual file names, the path of each entry with a safe name, and the image folder.

    `right_names`: by image id, the file in the folder that a name which leads out of it probably means.
    """

    images: list[Entry]
    paths: dict[int, Path]
    folder: Path
    right_names: dict[int, str]


def _locate(images: list[Entry], files: SplitFiles, report: Report) -> _Located:
    """Find the image files.

    A name that no file has is searched with other spellings. A name that fits two files, and a file that fits two
    names, are reported and left out.
    """
    name, images = str(files.annotations), [without_server(image) for image in images]
    places = ImageNames(
        files.image_folders, files.annotations, files.split, files.root, files.other_splits, files.follow_links
    )
    named = [path_elsewhere(text) or text for image in images if (text := usual_name(image)) is not None]
    folder = places.folder(named, report)
    paths: dict[int, Path] = {}
    found: dict[int, list[Path]] = {}
    outside: dict[int, str] = {}  # the last part of names that lead out of the folder
    for image in images:
        text = usual_name(image)
        elsewhere = path_elsewhere(text) if text is not None and is_text(text) else None
        if text is None or not is_text(text):
            continue
        if not (is_inside(text) or is_address(text) or elsewhere):
            outside[image["id"]] = PureWindowsPath(text).name
            continue
        path = folder / text
        if elsewhere or not os.path.lexists(path):
            found[image["id"]] = places.find(text)
        if elsewhere and not found[image["id"]]:
            outside[image["id"]] = PureWindowsPath(text).name
        if not elsewhere:  # an absolute path would lead out of the folder
            paths[image["id"]] = path
    exact = {os.path.normpath(path) for key, path in paths.items() if key not in found}
    names_of: dict[Path, set[str]] = {}
    for image in images:
        for path in found.get(image["id"], []):
            names_of.setdefault(path, set()).add(str(usual_name(image)))
    located = []
    for image in images:
        choices, text = found.get(image["id"], []), usual_name(image)
        problem = ""
        if len(choices) > 1:
            problem = f"may be {listed(choices)}. Correct the file name."
        elif choices and (len(names_of[choices[0]]) > 1 or str(choices[0]) in exact):
            others = sorted(names_of[choices[0]] - {text}) or ["another image"]
            problem = f"may be {choices[0]}, which may also be {listed(others)}. Correct the file names."
        if problem:
            where = f"{name}: image {image['id']}: no file has the name {text!r}; it"
            report("ambiguous-image", name, [image["id"]], f"{where} {problem}")
            continue
        misplaced = places.find_in_other_splits(str(text)) if image["id"] in found and not choices else []
        if misplaced:
            message = (
                f"{name}: image {image['id']}: no file of this split has the name {text!r}. {misplaced[0]} is in a"
                " folder of another split: write its path if it is meant, or add the missing file."
            )
            report("missing-image", name, [image["id"]], message)
            continue
        if choices:
            inside = choices[0].is_relative_to(folder)
            new = choices[0].relative_to(folder).as_posix() if inside else places.relative(choices[0])
            message = f"{name}: image {image['id']}: {text!r} is read from {choices[0]}."
            report("found-image", name, [image["id"]], message)
            paths[image["id"]] = choices[0]
            image = {**image, "file_name": new}
        elif text is not None and not image.get("file_name"):
            image = {**image, "file_name": text}
        located.append(image)
    return _Located(located, paths, folder, _right_names(images, outside, places, folder))


def _right_names(images: list[Entry], outside: Mapping[int, str], places: ImageNames, folder: Path) -> dict[int, str]:
    """The only file in the folder with the last part of each name, unless other images have the same last part."""
    if not outside:
        return {}
    counts = Counter(PureWindowsPath(text).name for image in images if (text := usual_name(image)) is not None)
    choices = {key: places.find(base) for key, base in outside.items() if counts[base] == 1}
    return {
        key: found[0].relative_to(folder).as_posix()
        for key, found in choices.items()
        if len(found) == 1 and found[0].is_relative_to(folder)
    }


def _sized(
    images: list[Entry], paths: Mapping[int, Path], exif_frame: ExifFrame, name: str, report: Report
) -> list[Entry]:
    """The image entries with whole numbers as height and width; those that aren't there are read from the files."""
    if all(type(image.get(key)) is int and image[key] > 0 for image in images for key in ("height", "width")):
        return images
    sized = []
    for image in images:
        given = [image.get("height"), image.get("width")]
        sides = [whole_number(side) for side in given]
        if all(side is not None and side > 0 for side in sides):
            if given != sides or not all(type(side) is int for side in given):
                message = f"{name}: image {image['id']}: size {given[1]!r} x {given[0]!r}."
                report("unusual-number", name, [image["id"]], message)
        elif image["id"] in paths:
            where = f"{name}: image {image['id']} ({paths[image['id']]})"
            try:
                found = size_in_frame(paths[image["id"]], where, exif_frame, name, report)
            except ImageError as error:
                report(kind_of(error), name, [image["id"]], str(error))
                continue
            sides = [side if side is not None and side > 0 else own for side, own in zip(sides, found, strict=True)]
            message = f"{where}: size {sides[1]}x{sides[0]}."
            report("size-from-file", name, [image["id"]], message)
        else:
            sides = given
        sized.append({**image, "height": sides[0], "width": sides[1]})
    return sized


def _merged(
    images: list[Entry], paths: Mapping[int, Path], name: str, report: Report
) -> tuple[list[Entry], dict[int, int]]:
    """The first entry of each file, and a map: id of each further entry -> id of the first."""
    entries = ImageEntries(name, report)
    merged: dict[int, int] = {}
    for image in images:
        path = paths.get(image["id"], Path(image["file_name"]))
        first = entries.add(image, path, f"{name}: image {image['id']}", image["id"])
        if first not in (image, None):
            merged[image["id"]] = first["id"]
    return entries.images, merged


def _check_categories(categories: list[Entry], used: set[int | None], name: str, report: Report) -> dict[int, str]:
    """Names by category id; several names for one id are an error only if annotations use it."""
    names: dict[int, str] = {}
    repeated = []
    for category in categories:
        key, text = category["id"], category.get("name")
        is_used = key in used
        if type(text) is int:
            report("number-as-name", name, [key], f"{name}: category {key} is named {str(text)!r}.")
            text = str(text)
        if not isinstance(text, str) or not is_text(text):
            problem = f"{name}: category {key}: expected a `name`, got {rle.brief(text)}."
            report("unnamed-category" if is_used else "bad-category-entry", name, [key], f"{problem} Correct it.")
            if is_used:
                names.setdefault(key, f"category {key}")
        elif key not in names:
            names[key] = text
        elif is_used and names[key].strip() != text.strip():
            problem = f"{name}: category {key} is named both {names[key]!r} and {text!r}. Give each class its own id."
            report("two-category-names", name, [key], problem)
        elif is_used:
            repeated.append(key)
    if repeated:
        message = f"{name}: category ids must be unique, found more than once: {listed(repeated)}. Renumber them."
        report("duplicate-category-id", name, repeated, message)
    return names


def _check_annotations(
    entries: list[Entry], name: str, report: Report, *, images: Set[int], categories: Mapping[int, str]
) -> list[Entry]:
    """The annotation entries with a unique id, an image, a category and a valid `iscrowd`."""
    tests: tuple[tuple[str, Callable[[Entry], bool], str], ...] = (
        ("bad-crowd", lambda entry: entry.get("iscrowd", 0) not in (0, 1), "have an `iscrowd` that isn't 0 or 1"),
        (
            "orphan-annotation",
            lambda entry: entry["image_id"] not in images,
            "refer to an image that isn't in `images`",
        ),
        (
            "unknown-category",
            lambda entry: entry["category_id"] not in categories,
            "refer to a category that isn't in `categories`",
        ),
    )
    valid = _unique_annotations(entries, name, report)
    for kind, is_wrong, what in tests:
        ids = [entry["id"] for entry in valid if is_wrong(entry)]
        if ids:
            message = f"{name}: {len(ids)} annotation(s) {what}: ids {listed(ids)}. Correct or remove them."
            report(kind, name, ids, message)
            valid = [entry for entry in valid if not is_wrong(entry)]
    return valid


def _with_ids(entries: list[Entry], ids: Ids, kind: str, name: str, report: Report) -> list[Entry]:
    """The entries with integers as ids, see `Ids`, without those that have no usable id."""
    valid = []
    for i, entry in enumerate(entries):
        number = ids.number_of(entry.get("id"))
        if number is None:
            _report_bad_id(entry, "id", f"{kind} at index {i}", kind, name, report)
            continue
        if type(entry["id"]) is not int or entry["id"] != number:
            message = f"{name}: {kind} {rle.brief(entry['id'])} has the number {number}."
            report("unusual-id", name, [number], message)
            entry = {**entry, "id": number}
        valid.append(entry)
    return valid


def _with_annotation_ids(entries: list[Entry], name: str, report: Report) -> list[Entry]:
    """The annotation entries with integers as ids; those without an id are numbered."""
    if all(type(entry.get("id")) is int and abs(entry["id"]) <= LARGEST_ID for entry in entries):
        return entries
    ids = Ids(entry.get("id") for entry in entries)
    unused = max(ids.numbers, default=0) + 1
    valid = []
    for i, entry in enumerate(entries):
        if entry.get("id") is None:
            report("missing-id", name, [unused], f"{name}: annotation at index {i} has the number {unused}.")
            valid.append({**entry, "id": unused})
            unused += 1
        else:
            valid += _with_ids([entry], ids, "annotation", name, report)
    return valid


def _with_references(entries: list[Entry], image_ids: Ids, category_ids: Ids, name: str, report: Report) -> list[Entry]:
    """The annotation entries with integers as references and as `iscrowd`, which is 0 where it is null.

    A reference to an unknown id is left unchanged.
    """
    valid = []
    for entry in entries:
        changed: Entry = {}
        for key, ids in (("image_id", image_ids), ("category_id", category_ids)):
            value = entry.get(key)
            if type(value) is int and value in ids.numbers and ids.is_plain:
                continue
            if not is_id(value):
                _report_bad_id(entry, key, f"annotation {rle.brief(entry['id'])}", "annotation", name, report)
                break
            number = ids.number_of(value)
            if number is not None and (type(value) is not int or number != value):
                changed[key] = number
                message = f"{name}: annotation {entry['id']}: {key} {rle.brief(value)} has the number {number}."
                report("unusual-id", name, [entry["id"]], message)
        else:
            crowd = entry.get("iscrowd", 0)
            if crowd is None:
                changed["iscrowd"] = 0
            elif isinstance(crowd, str) and whole_number(crowd) in (0, 1):
                changed["iscrowd"] = whole_number(crowd)
                message = f"{name}: annotation {entry['id']}: iscrowd {crowd!r}."
                report("unusual-number", name, [entry["id"]], message)
            valid.append({**entry, **changed} if changed else entry)
    return valid


def _report_bad_id(entry: Entry, key: str, label: str, kind: str, name: str, report: Report) -> None:
    found = f"got {rle.brief(entry[key])}" if key in entry else "found none"
    message = f"{name}: {label}: expected a whole number or text as `{key}`, {found}. Correct it."
    report(f"bad-{kind}-entry", name, [rle.brief(entry.get("id"))], message)


def _unique_images(images: list[Entry], name: str, report: Report) -> list[Entry]:
    """The first entry of each id. An id of entries that differ is an error that can't be corrected: its annotations may
    belong to each of the images.
    """
    first: dict[int, Entry] = {}
    repeated: dict[int, None] = {}
    shared: dict[int, Entry] = {}  # id -> an entry that differs from the first one
    for image in images:
        one = first.setdefault(image["id"], image)
        if one is not image:
            if _is_same_image(one, image):
                repeated[image["id"]] = None
            else:
                shared.setdefault(image["id"], image)
    if shared:
        key, other = next(iter(shared.items()))
        message = (
            f"{name}: image ids must be unique, found more than once: {listed(list(shared))}. Image {key} is"
            f" {_described(first[key])} and {_described(other)}, and annotations of image {key} may belong to each of"
            " them. Give each image its own id, and its annotations the same `image_id`; export files that were joined"
            " again as one, or renumber the images and annotations of one before they are joined."
        )
        report("duplicate-image-id", name, list(shared), message)
    if again := [key for key in repeated if key not in shared]:
        message = f"{name}: image ids must be unique, found more than once: {listed(again)}. List each image once."
        report("repeated-image-entry", name, again, message)
    return list(first.values())


def _is_same_image(one: Entry, other: Entry) -> bool:
    """Whether two entries have the same name and size, in any spelling; a missing size is equal to any."""
    for key in ("height", "width"):
        sides = {whole_number(one.get(key)), whole_number(other.get(key))} - {None}
        if len(sides) > 1:
            return False
    names = (os.path.normpath((usual_name(image) or "").replace("\\", "/")) for image in (one, other))
    return len(set(names)) == 1


def _described(image: Entry) -> str:
    return f"{usual_name(image)!r} of {rle.brief(image.get('width'))}x{rle.brief(image.get('height'))} pixels"


def _unique_annotations(entries: list[Entry], name: str, report: Report) -> list[Entry]:
    """One entry for each id; further annotations with the same id are renumbered, so that no object is lost."""
    counts = Counter(entry["id"] for entry in entries)
    repeated = [key for key, count in counts.items() if count > 1]
    if not repeated:
        return entries
    message = f"{name}: annotation ids must be unique, found more than once: {listed(repeated)}. Renumber them."
    report("duplicate-annotation-id", name, repeated, message)
    kept: dict[int, Entry] = {}
    unused = max(counts) + 1
    for entry in entries:
        if entry["id"] not in kept:
            kept[entry["id"]] = entry
        else:
            kept[unused] = {**entry, "id": unused}
            unused += 1
    return list(kept.values())
