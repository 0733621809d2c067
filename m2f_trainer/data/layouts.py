"""Find the annotation files and image folders of a COCO dataset, or take those that are given.

Layouts, in this order; names of folders in any case:

    {train,valid,val,test}/[annotations/]X.json        images beside it, in images, data or another folder of the split
    {annotations,labels}/[instances_]{train,val}.json  images in [images/]train2017, data/train, images, data or .
    {annotations,labels}/{train,val}/X.json            the same
    {train,val,test}.json                              the same
    X.json                                             one split, images in ., images, data or a folder of any name

X.json is one of the names that tools give (`_annotations.coco.json`, `labels.json`, ...) or has the keys of COCO. Each
may be gzipped. Two files for one split, or one beside them whose split isn't known, are refused.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2f_trainer.config.arguments import ExifFrame
from m2f_trainer.data.files import NO_ANNOTATIONS, NO_CATEGORIES, json_files, kind_of_json, stem, subfolders, visible
from m2f_trainer.errors import DataError

SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
_ORDER = tuple(dict.fromkeys(SPLITS.values()))
_KNOWN_NAMES = (
    "_annotations.coco",
    "_annotations.coco-segmentation",
    "_annotations",
    "annotations",
    "result",
    "labels",
    "instances_default",
)
_ANNOTATION_FOLDERS = ("annotations", "annotation", "labels", "label", "ann")
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "data", "jpegimages")
_OTHER_TASKS = (
    "captions_",
    "person_keypoints_",
    "stuff_",
    "panoptic_",
    "image_info_",
    "labels_",
)  # beside COCO's instances_*


@dataclass(frozen=True)
class SplitFiles:
    """One split of a dataset.

    Attributes:
        split: train, valid or test
        annotations: its annotation file, or the folder of its annotation files
        image_folders: folders that its images may be in, the most likely first
        format: a name in `m2f_trainer.data.formats.FORMATS`
        files: its annotation files where it has several
        classes: class names in the order of their ids from 1, of all splits, where the files don't number them
        exif_frame: the frame of annotations that don't say the sizes of their images
        follow_links: whether images may be links to files outside of the dataset folder
        root: the dataset folder, below which images are searched that are in none of `image_folders`
        other_splits: the other splits of the dataset, in whose folders no image is searched by its name alone
    """

    split: str
    annotations: Path
    image_folders: tuple[Path, ...]
    format: str = "COCO"
    files: tuple[Path, ...] = ()
    classes: tuple[str, ...] = ()
    exif_frame: ExifFrame = "auto"
    follow_links: bool = False
    root: Path | None = None
    other_splits: tuple[str, ...] = ()


def find_coco(folder: Path, named: bool = True) -> tuple[SplitFiles, ...]:
    """The splits of a COCO folder, in the order train, valid, test; none if there is no COCO file.

    Args:
        named: accept a file by its name alone, so that its reader can report what is wrong with it

    Raises:
        DataError: two files for one split, or one whose split isn't known beside others
    """
    for layout in (_split_folders, _annotation_folders, _split_files, _single_file):
        found = tuple(layout(folder, named))
        if found:
            return in_order(found)
    return ()


def annotated_folder(file: Path) -> Path:
    """The dataset folder of an annotation file: its own folder, or the parent of a folder called annotations."""
    return file.parent.parent if file.parent.name.lower() in _ANNOTATION_FOLDERS else file.parent


def coco_file(file: Path) -> SplitFiles:
    """One annotation file as a training split, with the folders near it that may hold its images."""
    base = annotated_folder(file)
    folders = (file.parent, *image_folders_of(base, stem(file), split_of_file(file) or "train"), *subfolders(base))
    return SplitFiles("train", file, tuple(dict.fromkeys(folders)))


def given_layout(
    root: str | Path, annotations: Mapping[str, str | Path], images: Mapping[str, str | Path] | None = None
) -> tuple[SplitFiles, ...]:
    """The layout as given for each split; images default to the folders near the annotation file.

    Paths are relative to `root` or, where nothing is there, to the working directory.

    Raises:
        DataError: an unknown split, or a file or folder that doesn't exist
    """
    folder, images = Path(root), images or {}
    for name in [*annotations, *images]:
        if name not in SPLITS or name not in annotations:
            raise DataError(f"split {name!r}: expected annotations for one of {', '.join(SPLITS)}. Correct its name.")
    found = []
    for name, path in annotations.items():
        file = _here(folder, path)
        if not file.is_file():
            raise DataError(
                f"{file}: expected the annotation file of split {name!r}, found {kind_of_path(file)}. Correct its path."
            )
        near = coco_file(file)
        folders = (image_folder(folder, name, images[name]),) if name in images else near.image_folders
        found.append(SplitFiles(SPLITS[name], file, folders))
    return in_order(tuple(found))


def split_paths(values: Sequence[str] | None, option: str) -> dict[str, str]:
    """The values of --annotations or --images, each SPLIT=PATH, as path by split.

    Raises:
        DataError: a value of another form, an unknown split, or one split twice
    """
    found: dict[str, str] = {}
    for value in values or ():
        split, _, path = value.partition("=")
        if split not in SPLITS or not path:
            raise DataError(
                f"--{option} {value}: expected SPLIT=PATH with one of the splits {', '.join(SPLITS)}, such as"
                f" --{option} train=PATH. Correct it."
            )
        if SPLITS[split] in map(SPLITS.__getitem__, found):
            raise DataError(f"--{option} {value}: split {split!r} is given twice. Keep one of them.")
        found[split] = path
    return found


def image_folder(root: Path, split: str, path: str | Path) -> Path:
    """The folder that was given for the images of a split.

    Raises:
        DataError: there is none
    """
    folder = _here(root, path)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected the image folder of split {split!r}, found {kind_of_path(folder)}. Correct its path."
        )
    return folder


def _here(root: Path, path: str | Path) -> Path:
    """The path relative to the dataset folder or, if nothing is there, to the working directory."""
    inside = root / path
    return Path(path) if not inside.exists() and Path(path).exists() else inside


def _split_folders(root: Path, named: bool) -> Iterator[SplitFiles]:
    for folder in subfolders(root):
        split = split_of(folder.name)
        if split is None:
            continue
        inside = [one for one in subfolders(folder) if one.name.lower() in _ANNOTATION_FOLDERS]
        files = next((found for where in (folder, *inside) if (found := _coco_files(where, named))), [])
        for file in files:
            candidates = (folder, *named_folders(folder, IMAGE_FOLDERS), *subfolders(folder))
            yield SplitFiles(split, file, tuple(dict.fromkeys(candidates)))


def _annotation_folders(root: Path, named: bool) -> Iterator[SplitFiles]:
    folders = [folder for folder in subfolders(root) if folder.name.lower() in _ANNOTATION_FOLDERS]
    files = next((found for folder in folders if (found := _coco_files(folder, named, every=True))), [])
    yield from _files_of_splits(root, files, lone="train")
    inside = [] if files else [(folder, split_of(folder.name)) for one in folders for folder in subfolders(one)]
    for folder, split in inside:
        if split is not None:
            for file in _coco_files(folder, named):
                yield SplitFiles(split, file, image_folders_of(root, folder.name, split))


def _split_files(root: Path, named: bool) -> Iterator[SplitFiles]:
    """Files in the dataset folder itself, named after their splits; train must be one of them."""
    files = _coco_files(root, named, every=True)
    if "train" in map(split_of_file, files):
        yield from _files_of_splits(root, files, lone=None)


def _single_file(root: Path, named: bool) -> Iterator[SplitFiles]:
    for file in _coco_files(root, named):
        folders = (root, *named_folders(root, IMAGE_FOLDERS), *subfolders(root))
        yield SplitFiles("train", file, tuple(dict.fromkeys(folders)))


def _coco_files(folder: Path, named: bool, every: bool = False) -> list[Path]:
    """The COCO files in a folder, by their keys or, if `named`, by a name that tools give; `every` adds the names of
    splits. A file that has the keys of another format isn't one.
    """
    files = json_files(folder)
    if any(file.name.startswith("instances_") for file in files):
        files = [file for file in files if not file.name.startswith(_OTHER_TASKS)]
    found = []
    for file in files:
        kind, name = kind_of_json(file), stem(file).lower()
        by_name = name in _KNOWN_NAMES and kind in ("", NO_ANNOTATIONS, NO_CATEGORIES)
        by_split = every and split_of(name) is not None and kind == ""
        if kind == "COCO" or (named and (by_name or by_split)):
            found.append(file)
    return found


def _files_of_splits(root: Path, files: Sequence[Path], lone: str | None) -> Iterator[SplitFiles]:
    """The files with the splits that they are named after; a single file may be `lone`.

    Raises:
        DataError: a file is named after no split
    """
    for file in files:
        split = split_of_file(file) or (lone if len(files) == 1 else None)
        if split is None:
            raise _ambiguous(files, f"{file} is named after no split")
        yield SplitFiles(split, file, image_folders_of(root, stem(file), split))


def image_folders_of(root: Path, name: str, split: str) -> tuple[Path, ...]:
    """The folders that may hold the images of an annotation file, the most likely first: [images/]train2017 for
    instances_train2017, then folders that are named after the split, then those that hold all images.
    """
    containers = named_folders(root, IMAGE_FOLDERS)
    inside = [folder for container in (*containers, root) for folder in subfolders(container)]
    name = name.lower().removeprefix("instances_")
    same_name = [folder for folder in inside if folder.name.lower() == name]
    same_split = [folder for folder in inside if split_of(folder.name) == split]
    return tuple(dict.fromkeys([*same_name, *same_split, *containers, root]))


def named_folders(root: Path, names: Sequence[str]) -> list[Path]:
    """The folders in `root` with one of these names, in any case, in the order of `names`."""
    found = [folder for folder in subfolders(root) if folder.name.lower() in names]
    return sorted(found, key=lambda folder: names.index(folder.name.lower()))


def split_of(name: str) -> str | None:
    """The split of names such as train2017, val-v2, test, coco_train, Train Set."""
    words = [part.rstrip("0123456789") for part in re.split(r"[-_ ]+", name.lower()) if part]
    return next((SPLITS[word] for word in (words[:1] + words[-1:]) if word in SPLITS), None)


def split_of_file(file: Path) -> str | None:
    """The split of an annotation file: as `split_of`, or the only one among the words, as in cells_train_v2.json."""
    words = re.split(r"[^a-z0-9]+", stem(file).lower())
    found = {SPLITS[word] for word in (word.rstrip("0123456789") for word in words) if word in SPLITS}
    return split_of(stem(file)) or (found.pop() if len(found) == 1 else None)


def by_split(root: Path, files: Sequence[Path], format: str, classes: tuple[str, ...] = ()) -> tuple[SplitFiles, ...]:
    """The splits of a format with several annotation files: by the folders below `root` that each file is in.

    Raises:
        DataError: some files are in folders of splits and some are not
    """
    groups: dict[str | None, list[Path]] = {}
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        groups.setdefault(next(filter(None, map(split_of, folders)), None), []).append(file)
    if None in groups and len(groups) > 1:
        rest = ", ".join(map(str, groups[None][:8]))
        raise DataError(
            f"{root}: {len(groups[None])} of {len(files)} {format} files are in no folder of a split: {rest}. Move them"
            " into train, valid or test."
        )
    found = []
    for split, some in groups.items():
        folder = Path(os.path.commonpath([file.parent for file in some]))
        found.append(SplitFiles(split or "train", folder, (root,), format, tuple(some), classes))
    return in_order(found)


def in_order(found: Sequence[SplitFiles]) -> tuple[SplitFiles, ...]:
    """The splits in the order train, valid, test.

    Raises:
        DataError: two are the same split
    """
    by_split: dict[str, SplitFiles] = {}
    for files in found:
        if files.split in by_split:
            same = [one.annotations for one in found if one.split == files.split]
            raise _ambiguous(same, f"two annotation files for split {files.split!r}")
        by_split[files.split] = files
    return tuple(by_split[split] for split in _ORDER if split in by_split)


def _ambiguous(files: Sequence[Path], problem: str) -> DataError:
    names = ", ".join(map(str, files[:8])) + (", ..." if len(files) > 8 else "")
    return DataError(
        f"{problem}: {names}. Keep one for each split, or name the file of each split: --annotations SPLIT=FILE, such"
        f" as --annotations {shlex.quote(f'train={files[0]}')}."
    )


def kind_of_path(path: Path) -> str:
    """What is at a path, for messages."""
    if path.is_dir():
        return "a folder"
    return "a file" if path.exists() else "nothing"


def listing(folder: Path) -> str:
    """The first entries of a folder, for messages."""
    names = [entry.name for entry in visible(folder)]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
