"""The formats of dataset folders: how their splits are found and read, and advice on converting other formats.

Only `find_splits` decides which files a dataset consists of; `Layout.describe` describes them for the user.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from m2f_trainer.config.arguments import ExifFrame
from m2f_trainer.data.coco_json import coco_contents, read_annotations
from m2f_trainer.data.files import (
    NO_CATEGORIES,
    file_parts,
    file_state,
    files_below,
    json_files,
    kind_of_json,
    stem,
    subfolders,
    visible,
)
from m2f_trainer.data.images import SUFFIXES
from m2f_trainer.data.labelme import find_labelme, read_labelme
from m2f_trainer.data.layouts import (
    SPLITS,
    SplitFiles,
    annotated_folder,
    coco_file,
    find_coco,
    given_layout,
    image_folder,
    image_folders_of,
    kind_of_path,
    listing,
)
from m2f_trainer.data.mask_images import find_mask_images, read_mask_images
from m2f_trainer.data.metadata_jsonl import find_metadata, read_metadata
from m2f_trainer.data.normalize import has_no_outline
from m2f_trainer.data.problems import ADD_OUTLINES, Report, raise_problem
from m2f_trainer.data.splits import FolderSplit
from m2f_trainer.data.yolo import find_yolo, label_folder, read_yolo, yolo_contents
from m2f_trainer.errors import DataError, EmptySplitError, mistyped_path


class Format(NamedTuple):
    """How one format is found in a folder and read.

    Attributes:
        find: the splits of a folder, in the order train, valid, test; none if it isn't of this format
        read: read and check one split
        contents: everything that the rows of a split depend on, as bytes, with size and time of images as their content
    """

    find: Callable[[Path], tuple[SplitFiles, ...]]
    read: Callable[[SplitFiles, Report], FolderSplit]
    contents: Callable[[SplitFiles], Iterator[bytes]]


def contents_of_many(files: SplitFiles) -> Iterator[bytes]:
    """The contents of annotation files, and names and states of all images, which are found by their names."""
    for file in files.files:
        yield os.fsencode(file)
        yield from file_parts(file)
    for folder in files.image_folders:
        for image in files_below(folder, SUFFIXES):
            yield os.fsencode(f"{image} {file_state(image)}")


FORMATS: Mapping[str, Format] = {
    "COCO": Format(find_coco, read_annotations, coco_contents),
    "YOLO": Format(find_yolo, read_yolo, yolo_contents),
    "imagefolder": Format(find_metadata, read_metadata, contents_of_many),
    "labelme": Format(find_labelme, read_labelme, contents_of_many),
    "masks": Format(find_mask_images, read_mask_images, contents_of_many),
}
"""Formats that are read, by name; the first one that is found in a folder is taken."""

_LISTED = 8  # files and folders that a description names
_DATUM = "pip install datumaro && datum convert -if {} -i FOLDER -f coco_instances -o converted -- --save-media"
OTHER_FORMATS: Mapping[str, str] = {
    "COCO panoptic": (
        "Convert it: pip install git+https://github.com/cocodataset/panopticapi && python -m"
        " panopticapi.converters.panoptic2detection_coco_format --things_only"
    ),
    "VGG Image Annotator project": "Export it from the annotator: Annotation, Export Annotations (COCO format)",
    "Supervisely": "Export it with Supervisely's app 'Export to COCO'",
    "Datumaro": f"Convert it: {_DATUM.format('datumaro')}",
    "SA-1B": "Join its files into one COCO file: `images` from each `image`, `annotations`, and one category",
    "Label Studio JSON": "Export it from Label Studio as 'COCO with images'",
    "Labelbox": "Export it as COCO with Labelbox's Python package (`labelbox.data.serialization.COCOConverter`)",
    "FiftyOne's own format": "Export it with FiftyOne: dataset_type=fiftyone.types.COCODetectionDataset",
    "COCO captions": "It has no masks: add the instances_*.json of the same images",
    "COCO images without annotations": "It has no masks: add the annotations of the same images",
    "CVAT for images": "Export it from CVAT as 'COCO 1.0'",
    "Pascal VOC": f"Convert it: {_DATUM.format('voc')}",
    "imagefolder without objects": (
        "Its metadata.jsonl has no `objects`: add them to each line, with a category and a segmentation"
    ),
    "datasets.save_to_disk": (
        "Write it as Parquet and name that folder: `for split, rows in datasets.load_from_disk('FOLDER').items():"
        " rows.to_parquet(f'as_parquet/{split}.parquet')`; or upload it with push_to_hub and name user/name"
    ),
    "datasets.Dataset.save_to_disk": (
        "Write it as Parquet and name that folder: `datasets.load_from_disk('FOLDER')"
        ".to_parquet('as_parquet/train.parquet')`; or upload it with push_to_hub and name user/name"
    ),
    "DOTA": f"Its oriented boxes aren't masks. {ADD_OUTLINES}",
    "archive": "Unpack it and name its folder: a zip file as in `python -m zipfile -e export.zip export`",
}
"""Formats that are recognised but not read -> how to convert them."""


@dataclass(frozen=True)
class Layout:
    """The files that a dataset consists of.

    Attributes:
        root: the dataset as it was named: a folder, an annotation file or a data.yaml
        splits: in the order train, valid, test
    """

    root: Path
    splits: tuple[SplitFiles, ...]

    def without(self, splits: Collection[str]) -> "Layout":
        """The layout without these splits."""
        return replace(self, splits=tuple(files for files in self.splits if files.split not in splits))

    def describe(self, folders: Mapping[str, Collection[Path]]) -> str:
        """Text for the user: the files and folders of each split, and those beside them that are not used.

        `folders` has the folders in which the images of each split were found.
        """
        base = self.root if self.root.is_dir() else self.root.parent
        formats = ", ".join(dict.fromkeys(files.format for files in self.splits))
        lines = [f"dataset {self.root} ({formats}):"]
        for files in self.splits:
            places = sorted(folders.get(files.split) or ())
            places = places if len(places) <= _LISTED else [Path(os.path.commonpath(places))]
            images = f", images in {', '.join(relative(place, base) for place in places)}" if places else ""
            lines.append(f"  {files.split:<5} {relative(files.annotations, base)}{images}")
        aside = self.aside(folders)
        if aside:
            more = f" and {len(aside) - _LISTED} more" if len(aside) > _LISTED else ""
            lines.append(f"  not used: {', '.join(relative(path, base) for path in aside[:_LISTED])}{more}")
        return "\n".join(lines)

    def aside(self, folders: Mapping[str, Collection[Path]]) -> list[Path]:
        """Folders of the dataset that no split uses, and annotation files beside those that are used."""
        if not self.root.is_dir():
            return []
        used = {_real(path) for some in folders.values() for path in some}
        for files in self.splits:
            used |= {_real(path) for path in (files.annotations, *files.files)}
            if files.format == "YOLO":
                used |= {_real(label_folder(folder, files.annotations.parent)) for folder in files.image_folders}
        around = used.union(*(path.parents for path in used))
        beside = {files.annotations.parent for files in self.splits if files.annotations.is_file()}
        found = [path for place in (self.root, *sorted(beside - {self.root})) for path in visible(place)]
        return [
            path
            for path in found
            if (_is_annotation_file(path) or (path.parent == self.root and path.is_dir()))
            and _real(path) not in around
            and not _links_into(path, used)
        ]


def _real(path: Path) -> Path:
    """The path without links. Path.resolve would raise on a link to itself."""
    return Path(os.path.realpath(path))


def _links_into(folder: Path, used: Collection[Path]) -> bool:
    """Whether a folder has links to files in used folders; few of its files are looked at."""
    return any(path.is_symlink() and _real(path).parent in used for path in visible(folder)[:_LISTED])


def relative(path: Path, base: Path) -> str:
    """A path below the dataset folder without that folder, for messages."""
    path, base = _real(path), _real(base)
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def find_splits(
    root: str | Path,
    annotations: Mapping[str, str | Path] | None = None,
    images: Mapping[str, str | Path] | None = None,
    exif_frame: ExifFrame = "auto",
    follow_links: bool = False,
) -> Layout:
    """The splits of a dataset: a folder, one annotation file or a data.yaml.

    Args:
        root: the folder or file; a folder is also searched two levels deeper, as unpacked archives have it
        annotations, images: annotation file and image folder by split, relative to `root`, instead of those found
        exif_frame: the frame of annotations that don't say the sizes of their images
        follow_links: whether images may be links to files outside of the dataset folder

    Raises:
        DataError: nothing is found, or more than one file for a split; the message names what is there
    """
    path = Path(root)
    if annotations:
        base = path if path.is_dir() else path.parent
        splits = given_layout(base, annotations, images)
    else:
        splits = _with_images(path, _find(path), images or {})
    given = {SPLITS[name] for name in images or {}}
    return Layout(
        path,
        tuple(
            replace(
                files,
                exif_frame=exif_frame,
                follow_links=follow_links,
                root=None if files.split in given else path if path.is_dir() else annotated_folder(path),
                other_splits=tuple(other.split for other in splits if other.split != files.split),
            )
            for files in splits
        ),
    )


def read_optional(files: SplitFiles, report: Report) -> FolderSplit | None:
    """As `read_split`; None for a test split without images or masks, which is reported."""
    try:
        return read_split(files, report)
    except EmptySplitError as error:
        if files.split != "test":
            raise
        report("test-left-out", files.annotations, [files.split], f"The test split is left out. {error}")
        return None


def read_split(files: SplitFiles, report: Report = raise_problem) -> FolderSplit:
    """Read and check one split.

    Raises:
        EmptySplitError: it has no images, or no masks
        DataError: it can't be used; the message names file, ids and remedy
    """
    split = FORMATS[files.format].read(files, report)
    entries = [(image, entry) for image in split.images for entry in split.annotations[image["id"]]]
    if entries and all(has_no_outline(entry.get("segmentation")) for _, entry in entries):
        image, entry = entries[0]
        raise EmptySplitError(
            f"{split.full_name(entry, image)}: segmentation is empty, as in all {len(entries)} annotations: these are"
            f" boxes only. {ADD_OUTLINES}."
        )
    return split


def contents(files: SplitFiles) -> Iterator[bytes]:
    """Everything that the rows of a split depend on, as bytes; size and modification time stand for an image's content.

    Raises OSError, DataError.
    """
    return FORMATS[files.format].contents(files)


def _find(path: Path) -> tuple[SplitFiles, ...]:
    if path.is_file():
        return _find_file(path)
    if not path.is_dir():
        problem = mistyped_path(str(path)) or f"{path}: found {kind_of_path(path)}."
        raise DataError(f"{problem} Expected a dataset folder, a COCO file, a data.yaml, or user/name on the Hub.")
    found = _search(path)
    if found:
        return found
    lone = [file for file in json_files(path) if kind_of_json(file) == NO_CATEGORIES]
    if len(lone) == 1:
        return (coco_file(lone[0]),)  # its reader reports what is wrong with it
    other = other_format(path)
    if other is not None:
        raise _not_read(*other)
    raise DataError(
        f"{path}: found no annotations; the folder holds {listing(path)}. Expected COCO JSON (one file, or one for each"
        " of train, valid and test), a data.yaml of YOLO, metadata.jsonl with objects, a labelme file for each image,"
        " or masks/ beside images/ (as PNG or TIFF: JPEG changes their values). If the files have other places, give"
        " --annotations SPLIT=FILE and --images SPLIT=FOLDER for each split."
    )


def _not_read(name: str, path: Path) -> DataError:
    return DataError(f"{path}: its format is {name}, which is not read. {OTHER_FORMATS[name]}.")


def _find_file(path: Path) -> tuple[SplitFiles, ...]:
    """The splits of a file: a COCO file is one split, a data.yaml names its splits."""
    if path.suffix.lower() in (".yaml", ".yml"):
        splits = find_yolo(path.parent, path)
        if not splits:
            raise DataError(f"{path}: expected a data.yaml with `names` and with image folders as `train` and `val`.")
        return splits
    if path.name.lower().endswith((".json", ".json.gz")):
        kind = kind_of_json(path)
        if kind in OTHER_FORMATS:
            raise _not_read(kind, path)
        return (coco_file(path),)
    if _is_archive(path):
        raise _not_read("archive", path)
    raise DataError(f"{path}: expected a dataset folder, a COCO file or a data.yaml, found a file. Name one of them.")


def _search(path: Path) -> tuple[SplitFiles, ...]:
    """The splits of a folder in the first format that is found; formats with a training split have priority."""
    first: tuple[SplitFiles, ...] = ()
    for form in FORMATS.values():
        splits = _search_deeper(path, form, 2)
        if splits and splits[0].split == "train":
            return splits
        first = first or splits
    return first


def _search_deeper(folder: Path, form: Format, levels: int) -> tuple[SplitFiles, ...]:
    """The splits of one format in a folder, or else in the only subfolder that has some.

    Raises:
        DataError: several subfolders have some
    """
    splits = form.find(folder)
    if splits or not levels:
        return splits
    nested = {one: found for one in subfolders(folder)[:100] if (found := _search_deeper(one, form, levels - 1))}
    if len(nested) > 1:
        names = ", ".join(str(one) for one in list(nested)[:8])
        raise DataError(
            f"{folder}: found {len(nested)} datasets in it: {names}. Name one of them, or give --annotations"
            " SPLIT=FILE and --images SPLIT=FOLDER for each split."
        )
    return tuple(_with_folders_around(folder, files) for found in nested.values() for files in found)


def _with_folders_around(folder: Path, files: SplitFiles) -> SplitFiles:
    """A COCO split with the folders around its own dataset folder that may hold its images, as in anno/train.json."""
    if files.format != "COCO":
        return files
    around = image_folders_of(folder, stem(files.annotations), files.split)
    return replace(files, image_folders=tuple(dict.fromkeys((*files.image_folders, *around))))


def _with_images(
    root: Path, splits: tuple[SplitFiles, ...], images: Mapping[str, str | Path]
) -> tuple[SplitFiles, ...]:
    """The splits with the image folders that were given."""
    folders = {}
    for name, path in images.items():
        if SPLITS.get(name) not in {files.split for files in splits}:
            found = ", ".join(files.split for files in splits)
            raise DataError(f"--images {name}={path}: expected one of the splits {found}. Correct its name.")
        folders[SPLITS[name]] = image_folder(root if root.is_dir() else root.parent, name, path)
    return tuple(
        replace(files, image_folders=(folders[files.split],)) if files.split in folders else files for files in splits
    )


def _is_annotation_file(path: Path) -> bool:
    return path.name.lower().endswith((".json", ".json.gz", ".jsonl", ".xml", ".csv")) or _is_archive(path)


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")) and path.is_file()


def other_format(folder: Path) -> tuple[str, Path] | None:
    """The format of a folder that is recognised but not read, and the file that shows it; None if there is none.

    Searches three levels of folders.
    """
    inside = [folder, *subfolders(folder)[:50]]
    places = [*inside, *(deeper for one in inside[1:] for deeper in subfolders(one)[:50])]
    for place in places:
        for path in visible(place):
            name = path.name.lower()
            if name.endswith((".json", ".json.gz")) and (kind := kind_of_json(path)) in OTHER_FORMATS:
                return kind, path
            if name == "metadata.jsonl":
                return "imagefolder without objects", path
            if name == "dataset_dict.json":
                return "datasets.save_to_disk", path
            if name.endswith(".arrow"):
                return "datasets.Dataset.save_to_disk", path
            if name.endswith(".xml") and _starts_with(path, b"<annotations>"):
                return "CVAT for images", path
            if name.endswith(".xml") and _starts_with(path, b"<annotation"):
                return "Pascal VOC", path
            if place.name.lower() == "segmentationobject":
                return "Pascal VOC", path
            if place.name.lower() == "labeltxt":
                return "DOTA", path
    archives = [path for path in visible(folder) if _is_archive(path)]
    images = any(path.suffix.lower() in SUFFIXES for place in places for path in visible(place))
    return ("archive", archives[0]) if archives and not images else None


def _starts_with(path: Path, text: bytes) -> bool:
    """Whether a text occurs at the start of a file."""
    try:
        with path.open("rb") as file:
            return text in file.read(200)
    except OSError:
        return False
