"""Find the annotation files and image folders of a COCO dataset, in a known layout or in one that is given.

Known layouts, in this order:

    {train,valid,val,test}/_annotations.coco.json      images beside it (Roboflow)
    annotations/instances_{train2017,val2017}.json     images in [images/]train2017, images or . (COCO, CVAT)
    {train,val,test}.json                              images in train, images/train, images or .
    {_annotations.coco,annotations,result,labels}.json one split, images in ., images, data or a folder of any name
    *.json, if there is only one                       the same (Label Studio, VGG's annotator, others)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
_BESIDE = ("_annotations.coco.json", "_annotations.coco-segmentation.json", "_annotations.json")
_SINGLE = ("_annotations.coco.json", "annotations.json", "result.json", "labels.json", "instances_default.json")


@dataclass(frozen=True)
class SplitFiles:
    """One split: its annotation file, and the folders that its images may be in, the most likely first."""

    split: str
    annotations: Path
    image_folders: tuple[Path, ...]


def find_layout(root: str | Path) -> tuple[SplitFiles, ...]:
    """The splits of a dataset folder, in the order train, valid, test.

    Raises:
        DataError: no folder, no annotation file of a known layout, or two for one split
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a dataset folder, found {_kind(folder)}. Check `dataset_name`.")
    for layout in (_split_folders, _annotations_folder, _split_files, _single_file):
        found = tuple(layout(folder))
        if found:
            return _in_order(found)
    raise DataError(
        f"{folder}: found no COCO annotations. Expected train/_annotations.coco.json beside the images,"
        f" annotations/instances_train*.json with image folders, train.json and val.json, or a single JSON file;"
        f" the folder holds {_listing(folder)}. For another layout, give `annotations` and `images` for each split."
    )


def given_layout(
    root: str | Path, annotations: Mapping[str, str | Path], images: Mapping[str, str | Path] | None = None
) -> tuple[SplitFiles, ...]:
    """The layout as given for each split, paths relative to `root`; images default to the annotation file's folder.

    Raises:
        DataError: an unknown split, or a file or folder that doesn't exist
    """
    folder, images = Path(root), images or {}
    for name in [*annotations, *images]:
        if name not in SPLITS or name not in annotations:
            raise DataError(f"split {name!r}: expected annotations for one of {', '.join(SPLITS)}. Correct its name.")
    found = []
    for name, path in annotations.items():
        file = folder / path
        if not file.is_file():
            raise DataError(
                f"{file}: expected the annotation file of split {name!r}, found {_kind(file)}. Correct its path."
            )
        beside = folder / images[name] if name in images else file.parent
        if not beside.is_dir():
            raise DataError(
                f"{beside}: expected the image folder of split {name!r}, found {_kind(beside)}. Correct its path."
            )
        found.append(SplitFiles(SPLITS[name], file, (beside,)))
    return _in_order(tuple(found))


def _split_folders(root: Path) -> Iterator[SplitFiles]:
    for name, split in SPLITS.items():
        for beside in _BESIDE:
            file = root / name / beside
            if file.is_file():
                yield SplitFiles(split, file, (file.parent, file.parent / "images"))
                break


def _annotations_folder(root: Path) -> Iterator[SplitFiles]:
    files = sorted((root / "annotations").glob("instances_*.json")) or sorted((root / "annotations").glob("*.json"))
    for file in files:
        stem = file.stem.removeprefix("instances_")
        split = _split_of(stem) or ("train" if len(files) == 1 else None)
        if split is not None:
            yield _split_file(root, file, stem, split)


def _split_files(root: Path) -> Iterator[SplitFiles]:
    """Files in the dataset folder itself, named after their splits; train must be one of them."""
    files = [(file, file.stem.removeprefix("instances_")) for file in sorted(root.glob("*.json"))]
    found = [(file, stem, split) for file, stem in files if (split := _split_of(stem))]
    if any(split == "train" for _, _, split in found):
        yield from (_split_file(root, *one) for one in found)


def _split_file(root: Path, file: Path, stem: str, split: str) -> SplitFiles:
    folders = [root / "images" / stem, root / stem, root / "images" / split, root / split, root / "images", root]
    return SplitFiles(split, file, tuple(dict.fromkeys(folders)))


def _single_file(root: Path) -> Iterator[SplitFiles]:
    files = [root / name for name in _SINGLE if (root / name).is_file()]
    if not files and not any(root.glob("*.y*ml")):  # beside YOLO's data.yaml, a JSON file may be anything
        files = sorted(root.glob("*.json"))
    if files and (len(files) == 1 or files[0].name in _SINGLE):
        folders = (root, root / "images", root / "data", *sorted(path for path in root.iterdir() if path.is_dir()))
        yield SplitFiles("train", files[0], tuple(dict.fromkeys(folders)))


def _split_of(stem: str) -> str | None:
    """The split of names such as train2017, val-v2, test, coco_train."""
    words = [part.rstrip("0123456789") for part in stem.lower().replace("-", "_").split("_") if part]
    return next((SPLITS[word] for word in (words[:1] + words[-1:]) if word in SPLITS), None)


def _in_order(found: tuple[SplitFiles, ...]) -> tuple[SplitFiles, ...]:
    order = list(dict.fromkeys(SPLITS.values()))
    by_split: dict[str, SplitFiles] = {}
    for files in found:
        if files.split in by_split:
            first = by_split[files.split].annotations
            raise DataError(
                f"two annotation files for split {files.split!r}: {first} and {files.annotations}."
                " Remove one, or name one as `annotations`."
            )
        by_split[files.split] = files
    return tuple(by_split[split] for split in order if split in by_split)


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "a file" if path.exists() else "nothing"


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
