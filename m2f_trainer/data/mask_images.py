"""Read masks that are stored as images: one image of object ids for each photo, or one image for each object.

    images/a.png        masks/a.png                     ids as values, 0 where there is no object; also instances/,
                                                        labels/, gt/, or a_masks.png beside a.png (Cellpose)
    leftImg8bit/x/a_leftImg8bit.png  gtFine/x/a_gtFine_instanceIds.png      Cityscapes: class * 1000 + number
    a/images/a.png      a/masks/{1,2,3}.png             one mask for each object (Data Science Bowl 2018)
    images/a.png        masks/a/{1,2,3}.png             the same

An image of ids has no classes; its objects get the class "object". Values that may also be class ids of a semantic
segmentation are refused, unless a folder or file is named as instances.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from m2f_trainer.data.files import files_below
from m2f_trainer.data.image_names import LINK_ADVICE
from m2f_trainer.data.images import SUFFIXES, check_pixels, image_size, open_stored
from m2f_trainer.data.layouts import SplitFiles, by_split, split_of
from m2f_trainer.data.normalize import is_text
from m2f_trainer.data.problems import Key, Report, listed, raise_problem
from m2f_trainer.data.splits import Entry, FolderSplit
from m2f_trainer.errors import DataError, ImageError
from m2f_trainer.masks.rle import brief, write_counts

_MASK_WORDS = {"mask", "masks", "instance", "instances", "inst", "label", "labels", "gt", "gtfine", "gtcoarse",
               "annotations", "groundtruth"}  # fmt: skip
_IMAGE_WORDS = {"image", "images", "img", "imgs", "leftimg8bit", "photo", "photos", "rgb", "raw", "data"}
_MASK_ENDING = re.compile(r"[_-](masks?|instances?|instance_?ids|inst|labels?|gt|seg|cp_masks)$", re.IGNORECASE)
_IMAGE_ENDING = re.compile(r"[_-](leftimg8bit|image|img|raw)$", re.IGNORECASE)
_CITYSCAPES = re.compile(r"_gt(fine|coarse)_instanceids$", re.IGNORECASE)
_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")  # of masks: formats that keep values
_EXAMINED = 50  # masks that decide whether values are objects
_MANY = 20  # semantic datasets rarely have more classes
_FEWER_FLOATS = 2**24  # from which on floats of 32 bits lack whole numbers
_LARGE_ID = 2**16  # from which on objects are renumbered, because a table of all ids takes too much memory
_VOC_VOID = 255  # the value of the border around objects
_CLASS = 1  # the id of the only class where masks have none

CITYSCAPES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 29: "caravan", 30: "trailer", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""The classes with instances by their id (cityscapesscripts/helpers/labels.py)."""


def find_mask_images(root: Path) -> tuple[SplitFiles, ...]:
    """The splits of a folder with images and masks: by the folders that the masks are in, such as `train`.

    Raises:
        DataError: some masks are in folders of splits and some are not
    """
    masks, images = _masks_and_images(root)
    if not masks or not _pair(masks, images, root, "", pass_over):
        return ()
    return by_split(root, masks, "masks")


def pass_over(kind: str, file: object, ids: Sequence[Key], message: str, image: int | None = None) -> None:
    """The `Report` that ignores every problem."""


def _split(path: Path, root: Path) -> str | None:
    return next(filter(None, map(split_of, path.relative_to(root).parts[:-1])), None)


def _masks_and_images(root: Path) -> tuple[list[Path], list[Path]]:
    """The masks below a folder, by the names of their folders or their own, and the other images."""
    found = files_below(root, SUFFIXES)
    cityscapes = [path for path in found if _CITYSCAPES.search(path.stem)]
    if cityscapes:
        return cityscapes, [path for path in found if path.stem.lower().endswith("_leftimg8bit")]
    stems = {path.stem for path in found}
    masks: list[Path] = []
    images: list[Path] = []
    for path in found:
        in_folder = any(_words(part) & _MASK_WORDS for part in path.relative_to(root).parts[:-1])
        beside = _MASK_ENDING.search(path.stem) and _MASK_ENDING.sub("", path.stem) in stems
        (masks if (in_folder or beside) and path.suffix.lower() in _SUFFIXES else images).append(path)
    return masks, images


def read_mask_images(files: SplitFiles, report: Report = raise_problem) -> FolderSplit:
    """Read and check one split; image ids count from 1 in the order of the file names.

    Raises:
        DataError: no image has a mask, masks don't match images, or their values may be classes instead of objects
    """
    root, name = files.image_folders[0], str(files.annotations)
    split = _split(files.files[0], root)
    candidates = [path for path in _masks_and_images(root)[1] if _split(path, root) == split]
    cityscapes = _CITYSCAPES.search(files.files[0].stem) is not None
    masks_of = _pair(files.files, candidates, root, name, report)
    if not cityscapes:
        _check_instances([some[0] for some, one_each in masks_of.values() if not one_each], files)
    images: list[Entry] = []
    groups: dict[int, list[Entry]] = {}
    left_out: list[int] = []
    number = 0
    for path, (masks, one_each) in masks_of.items():
        image = _image(path, root, len(images) + 1, name, report)
        if image is not None:
            with contextlib.suppress(ImageError):  # reported when its objects are read
                height, width = image_size(masks[0], str(masks[0]))
                if (height, width) == (image["width"], image["height"]):  # drawn on the photo as viewers show it
                    image.update(height=height, width=width)
            images.append(image)
            groups[image["id"]] = []
        for mask in masks:
            for value, segmentation in _objects_of(mask, one_each, files, image, report):
                found = _category(value) if cityscapes else (_CLASS, 0)
                if found is None:
                    continue
                number += 1
                if image is None:
                    left_out.append(number)
                else:
                    entry = {"id": number, "image_id": image["id"], "category_id": found[0], "iscrowd": found[1]}
                    groups[image["id"]].append({**entry, "segmentation": segmentation})
    if not images:
        raise DataError(f"{name}: found no image with a mask. Name masks as their images, or remove the split.")
    return FolderSplit(
        name,
        tuple(images),
        groups,
        CITYSCAPES if cityscapes else {_CLASS: "object"},
        root,
        follow_links=files.follow_links,
        left_out=left_out,
    )


def _category(value: int) -> tuple[int, int] | None:
    """(category id, iscrowd) of a value of Cityscapes; None for classes without instances.

    A value of class and number is an object; a class alone is a group of objects, which is a crowd region.
    """
    category = value // 1000 if value >= 1000 else value
    return (category, int(value < 1000)) if category in CITYSCAPES else None


def _pair(
    masks: Sequence[Path], images: Sequence[Path], root: Path, name: str, report: Report
) -> dict[Path, tuple[list[Path], bool]]:
    """The masks of each image, and whether each mask is one object; images and masks without a partner are reported.

    Raises:
        DataError: two masks have the name of one image
    """
    of_images = {(*_place(image.parent, root), image.stem) for image in images}
    by_name: dict[tuple[str, ...], list[Path]] = {}
    by_folder: dict[tuple[str, ...], list[Path]] = {}
    for mask in masks:  # an image's name is kept whole as that of a mask or its folder
        place, parent = _place(mask.parent, root), mask.parent
        whole = (*place, mask.stem)
        by_name.setdefault(whole if whole in of_images else (*place, _mask_stem(mask)), []).append(mask)
        folder = () if parent == root else (*_place(parent.parent, root), parent.name)
        by_folder.setdefault(folder if folder in of_images else place, []).append(mask)
    beside = Counter(image.parent for image in images)
    found: dict[Path, tuple[list[Path], bool]] = {}
    for image in images:
        place, stem = _place(image.parent, root), _IMAGE_ENDING.sub("", image.stem)
        same_name = by_name.get((*place, image.stem)) or by_name.get((*place, stem), [])
        if len(same_name) > 1:
            names = ", ".join(map(str, same_name[:3]))
            raise DataError(f"{image}: found {len(same_name)} masks of its name: {names}. Keep one of them.")
        own_folder = by_folder.get((*place, image.stem)) or by_folder.get((*place, stem), [])
        if not own_folder and beside[image.parent] == 1 and _words(image.parent.name) & _IMAGE_WORDS:
            own_folder = by_folder.get(place, [])
        if same_name or own_folder:
            found[image] = (same_name, False) if same_name else (own_folder, True)
        else:
            message = (
                f"{image}: found no mask of this image. Add one, all 0 where it has no object, or remove the image."
            )
            report("bad-image-entry", name, [image.relative_to(root).as_posix()], message)
    lost = sorted(set(masks).difference(*(some for some, _ in found.values())))
    if lost:
        shown = [mask.relative_to(root).as_posix() for mask in lost]
        message = f"{name}: {len(lost)} masks have no image of their name: {listed(shown)}. Add the images."
        report("orphan-annotation", name, shown, message)
    return found


def _words(name: str) -> set[str]:
    """The words of a folder's name."""
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _place(folder: Path, root: Path) -> tuple[str, ...]:
    """A folder's path below the root without words such as "masks" and "images", equal for an image and its mask."""
    rest = (
        "_".join(word for word in re.split(r"[^a-z0-9]+", part.lower()) if word not in _MASK_WORDS | _IMAGE_WORDS)
        if _words(part) & (_MASK_WORDS | _IMAGE_WORDS)
        else part
        for part in folder.relative_to(root).parts
    )
    return tuple(filter(None, rest))


def _mask_stem(mask: Path) -> str:
    """The name of a mask without endings such as "_mask", equal to that of its image."""
    stem = _CITYSCAPES.sub("", mask.stem)
    return _MASK_ENDING.sub("", stem) if stem == mask.stem else stem


def _image(path: Path, root: Path, image_id: int, name: str, report: Report) -> Entry | None:
    file_name = path.relative_to(root).as_posix()
    if not is_text(file_name):
        report("bad-image", name, [brief(file_name)], f"{path!r}: the name isn't UTF-8. Rename the file.")
        return None
    try:
        height, width = image_size(path, f"image {image_id} ({path})")
    except ImageError as error:
        report("bad-image", name, [file_name], str(error))
        return None
    return {"id": image_id, "file_name": file_name, "height": height, "width": width}


def _objects_of(
    mask: Path, one_each: bool, files: SplitFiles, image: Entry | None, report: Report
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(value, segmentation) of each object of a mask; `image` is None for one that can't be used."""
    root, name = files.image_folders[0], str(files.annotations)
    shown, image_id = mask.relative_to(root).as_posix(), None if image is None else image["id"]
    try:
        values, void = read_mask(mask, root, files.follow_links)
        if one_each:
            values = (values != 0).any(axis=2) if values.ndim == 3 else values != 0
        elif values.ndim == 3:
            raise ImageError(
                f"{mask}: expected one channel with the ids of objects as values, got {values.shape[2]} channels that"
                " differ. Save it as an 8- or 16-bit grey PNG."
            )
    except ImageError as error:
        report("bad-mask", name, [shown], str(error), image_id)
        return
    if image is not None and values.shape != (image["height"], image["width"]):
        message = (
            f"{mask}: expected {image['width']}x{image['height']} pixels as its image, got"
            f" {values.shape[1]}x{values.shape[0]}. Save it in the size of its image."
        )
        report("bad-mask", name, [shown], message, image_id)
        return
    if void:
        message = f"{mask}: {void} pixels of the value {_VOC_VOID} in Pascal VOC's palette are taken as background."
        report("void-border", name, [shown], message, image_id)
    for value, counts in counts_of_values(values):
        yield value, {"size": list(values.shape), "counts": counts}


def read_mask(path: Path, root: Path, follow_links: bool = False) -> tuple[npt.NDArray[Any], int]:
    """The values of a mask from 0, (H, W), or (H, W, C) where its channels differ; the indices of a palette image,
    with 0 as that of black where both occur.

    Alpha is dropped. Whole numbers may be stored as floating-point numbers, as ImageJ does. Pixels of the void border
    around objects in masks with Pascal VOC's palette get the value 0; their number is the second result. Where 255 is
    the only value, it is that of objects.

    Raises:
        ImageError: it can't be read, has values that aren't whole numbers from 0, or a link leads out of the dataset
            folder without `follow_links`
    """
    if not follow_links and not os.path.realpath(path).startswith(os.path.realpath(root).rstrip("/") + "/"):
        raise ImageError(f"{path}: the file leads out of {root}. Copy it into the folder. {LINK_ADVICE}")
    image = open_stored(path, str(path))
    check_pixels(image.size, str(path))
    try:
        values, several = np.asarray(image), number_of_frames(image) > 1
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: the image data is damaged ({error}). Replace the file.") from error
    if several:
        raise ImageError(f"{path}: expected one mask, got a file of several. Save each in its own file.")
    wrong = values < 0
    if values.dtype.kind == "f":
        wrong |= (values != np.floor(values)) | (values >= _FEWER_FLOATS)
    if wrong.any():
        raise ImageError(
            f"{path}: expected whole numbers from 0 as values, with 0 where there is no object, got"
            f" {values[wrong][0]}. Save it as an 8- or 16-bit grey PNG."
        )
    if image.mode in ("RGBA", "LA"):
        values = values[..., :-1]
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.dtype.kind == "f":
        values = values.astype(np.int64)
    if image.mode == "P":
        values = _with_black_as_zero(values, image)
    if not _has_voc_palette(image) or np.isin(values, (0, _VOC_VOID)).all():
        return values, 0
    void = values == _VOC_VOID
    return np.where(void, 0, values), int(void.sum())


def _with_black_as_zero(indices: npt.NDArray[Any], image: Image.Image) -> npt.NDArray[Any]:
    """The indices (H, W) of a palette image, in which black and 0 change places where 0 has another colour and black
    more pixels.

    Pillow's `quantize` sorts colours from light to dark. ImageJ's inverted palette is one for display, and a
    transparent 0 is no object: it stays as it is.
    """
    colours = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    black = np.intersect1d(indices, np.flatnonzero(~colours.any(axis=1)))
    is_inverted = np.array_equal(colours, np.repeat(np.arange(256)[::-1, None], 3, axis=1))
    opacity = image.info.get("transparency")  # of each index, or the one that is transparent
    is_clear = opacity == 0 or (isinstance(opacity, bytes) and opacity[:1] == bytes(1))
    if not black.size or not colours[0].any() or is_inverted or is_clear:
        return indices
    if np.isin(indices, black).sum() <= (indices == 0).sum():
        return indices
    new: npt.NDArray[Any] = np.arange(256, dtype=np.uint8)
    new[0], new[black] = black[0], 0
    return new.take(indices)


def _has_voc_palette(image: Image.Image) -> bool:
    """Whether an image has the colours of Pascal VOC's masks, which other datasets of palette images use, too."""
    colours = image.getpalette() if image.mode == "P" else None
    return (
        colours is not None and (colours[3:6], colours[-3:]) == ([128, 0, 0], [224, 224, 192]) and len(colours) == 768
    )


def number_of_frames(image: Image.Image) -> int:
    """The number of images in a file, counted up to 2."""
    try:
        image.seek(1)
    except EOFError:
        return 1
    return 2


def counts_of_values(values: npt.NDArray[Any]) -> Iterator[tuple[int, str]]:
    """(value, compressed RLE of its pixels) of each value but 0 of an array (H, W)."""
    height, width = values.shape
    flat = values.astype(np.int64).T.ravel()  # column-major, as COCO's run lengths are
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.concatenate([starts[1:], [flat.size]])
    order = np.argsort(flat[starts], kind="stable")
    ids, first = np.unique(flat[starts][order], return_index=True)
    for value, some in zip(ids.tolist(), np.split(order, first[1:]), strict=True):
        if value != 0:
            edges = np.stack([starts[some], ends[some]], axis=1).ravel()
            runs = np.diff(np.concatenate([[0], edges, [flat.size]] if edges[-1] < flat.size else [[0], edges]))
            yield value, write_counts(runs, height, width)


def _check_instances(masks: Sequence[Path], files: SplitFiles) -> None:
    """Raise DataError where the values of masks may be classes of pixels instead of objects."""
    root, name = files.image_folders[0], str(files.annotations)
    if any(
        _words(part) & {"instance", "instances", "inst"} for mask in masks[:1] for part in mask.relative_to(root).parts
    ):
        return
    whole, total, counts, contiguous, largest = 0, 0, set[int](), True, 0
    for mask in masks[:_EXAMINED]:
        try:
            values, _ = read_mask(mask, root, files.follow_links)
        except ImageError:  # reported when its objects are read
            continue
        ids: list[int] = np.unique(values[values != 0]).tolist() if values.ndim == 2 else []
        if not ids:
            continue
        large = ids[-1] >= _LARGE_ID
        numbers = np.where(values != 0, np.searchsorted(ids, values) + 1, 0) if large else values.astype(np.int32)
        boxes = [(number, box) for number, box in enumerate(ndimage.find_objects(numbers), 1) if box is not None]
        pieces = [ndimage.label(numbers[box] == number, np.ones((3, 3)))[1] for number, box in boxes]
        whole, total = whole + pieces.count(1), total + len(pieces)
        counts.add(len(ids))
        contiguous, largest = contiguous and ids == list(range(1, len(ids) + 1)), max(largest, *ids)
    numbered = largest > _MANY or (contiguous and len(counts) > 1)
    if total and not (whole >= 0.8 * total and max(counts) >= 3 and numbered):
        raise DataError(
            f"{name}: the values of these masks may be classes of pixels instead of objects: a mask has at most"
            f" {max(counts)} values, and {whole} of {total} are in one piece. If each value is an object, name the"
            " folder of the masks `instances`. If not, number the objects first, as scipy.ndimage.label(mask == value)"
            " does for those that don't touch."
        )
