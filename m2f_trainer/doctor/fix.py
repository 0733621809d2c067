"""`m2f check --fix`: write a corrected copy of a dataset and a list of all changes. The original is only read.

The copy is examined in a temporary folder first; if it has an error, nothing is written.
"""

import json
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from m2f_trainer.data.categories import normalized_name
from m2f_trainer.data.dataset import held_out
from m2f_trainer.data.layouts import annotated_folder
from m2f_trainer.data.problems import KINDS, Finding, listed
from m2f_trainer.data.splits import Entry, FolderSplit, SplitAnnotations
from m2f_trainer.data.transforms import read_image
from m2f_trainer.doctor.duplicates import same_in_detail
from m2f_trainer.doctor.examine import CLEAN, UNUSABLE, Examination, ImageKey, examine
from m2f_trainer.doctor.scan import Scan
from m2f_trainer.errors import DataError

CHANGES = "changes.json"
_DUPLICATE_KINDS = ("duplicate-image", "leakage")
_CONSEQUENCES = ("missing-split", "no-objects")  # which may be gone when other errors are corrected
_KEEP_ORDER = ("test", "valid", "train")  # an image in several splits stays in the first of these
_LOST_IMAGES = ("bad-image-entry", "missing-image", "bad-image", "wrong-image-size", "unsafe-path")
_LOST_OBJECTS = ("bad-annotation-entry", "bad-crowd", "orphan-annotation", "unknown-category", "bad-mask", "no-mask")
_SAME_BOX = 0.02  # of the image's sides: how far the boxes of one object in two duplicates may lie apart
_SAME_BOX_IOU = 0.5  # which these boxes have at least: those of small neighbours are close, too, but hardly overlap

Change: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Repair:
    """The changes in a corrected copy.

    Attributes:
        changes: all changes, as in the file changes.json
        counts: split -> "images", "objects" or "classes" -> their number in the original and in the copy
        left_out: split -> "images" or "annotations" -> ids of those that the copy lacks
        dropped: splits without a usable image, or a test split without images or masks, which the copy lacks
    """

    changes: list[Change]
    counts: Mapping[str, Mapping[str, tuple[int, int]]]
    left_out: Mapping[str, Mapping[str, Sequence[int | str]]]
    dropped: Sequence[str]

    def to_text(self) -> str:
        """The comparison with the original, for a terminal."""
        lines = []
        for split, counts in self.counts.items():
            found = ", ".join(f"{after} of {before} {what}" for what, (before, after) in counts.items())
            dropped = "; the split is dropped" if split in self.dropped else ""
            lines.append(f"  {split}: {found}{dropped}")
            lines += [f"    left out: {what} {listed(ids)}" for what, ids in self.left_out[split].items() if ids]
        unread = [split for split in self.dropped if split not in self.counts]
        lines += [f"  {split}: no images or masks; the split is dropped" for split in unread]
        return "\n".join(lines)


def repair(examination: Examination, target: Path, remove_leaked: bool = False) -> Repair:
    """Write `target`/<split>/_annotations.coco.json with images beside it, and `target`/changes.json.

    Args:
        remove_leaked: keep an image that is in several splits only in the last of train, valid and test

    Raises:
        DataError: `target` is not empty, or lies inside the dataset; or an error remains that can't be corrected
    """
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise DataError(f"{target}: expected a new or empty folder for the corrected copy. Name another one.")
    for folder in dataset_folders(examination):
        if target.resolve().is_relative_to(folder):
            raise DataError(f"{target}: expected a folder outside the dataset {folder}. Name another one.")
    _refuse(_without_fix(examination))
    plan = _Plan(examination, remove_leaked)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    copy = staging / "copy"
    try:
        copy.mkdir()
        for split, content in plan.contents.items():
            if content["images"]:
                _write_corrected(examination, split, {**content, "categories": plan.categories}, copy / split)
        after = examine(copy, examination.settings)
        if after.status != CLEAN:
            _refuse(after.findings, copy)
        changes = [*_finding_changes(examination), *plan.changes]
        (copy / CHANGES).write_text(json.dumps(changes, indent=1, ensure_ascii=False), encoding="utf-8")
        if target.exists():
            target.rmdir()
        copy.rename(target)
    finally:
        shutil.rmtree(staging)
    return _compared(examination, plan, changes)


def dataset_folders(examination: Examination) -> list[Path]:
    """The folders of a dataset, absolute; no copy is written into them.

    For a dataset given by its annotation file: the folder of that file (or its parent, if it is called annotations)
    and those of the images.
    """
    root = Path(examination.dataset).resolve()
    folders = [split.folder.resolve() for split in examination.splits.values() if isinstance(split, FolderSplit)]
    return [annotated_folder(root) if root.is_file() else root, *folders]


def can_be_corrected(examination: Examination) -> bool:
    """Whether --fix corrects all errors but those that may follow from others; never where no object can be kept."""
    if examination.status == UNUSABLE or _without_fix(examination):
        return False
    errors = {one.kind for one in examination.findings if one.severity == "error"}
    changed = {one.kind for one in examination.findings if KINDS[one.kind].fix}
    if errors and not changed & (errors | {"brush-crowd"}):
        return False
    if "missing-split" in errors:
        train = [scan.entry["file_name"] for scan in examination.scans.get("train", ())]
        if not held_out(train):
            return False  # a split would be missing in the copy, too
    objects = (one for scans in examination.scans.values() for scan in scans for one in scan.objects)
    return any(not one["iscrowd"] or "brush-crowd" in one["findings"] for one in objects)


def suggested_folder(examination: Examination) -> Path:
    """A new folder for a corrected copy, outside of the dataset: `corrected`, or one beside the dataset."""
    inside = dataset_folders(examination)
    places = [Path("corrected"), *(folder.with_name(f"{folder.name}-corrected") for folder in inside)]
    names = (place.with_name(f"{place.name}{number}") for place in places for number in ("", *range(2, 100)))
    return next(
        (one for one in names if not one.exists() and not any(map(one.resolve().is_relative_to, inside))),
        places[0],
    )


def _without_fix(examination: Examination) -> list[Finding]:
    found = [one for one in examination.findings if one.severity == "error"]
    return [one for one in found if not KINDS[one.kind].fix and one.kind not in _CONSEQUENCES]


def _refuse(findings: Sequence[Finding], copy: Path | None = None) -> None:
    """Raise DataError for the errors among findings: of the original, or of a copy, whose files are named without its
    folder, which is deleted.
    """
    errors = [one for one in findings if one.severity == "error"]
    if not errors:
        return
    whose = "the corrected copy would have" if copy else "the dataset has"
    found = [f"{KINDS[one.kind].title} ({one.count}): {one.message}" for one in errors]
    if copy:
        found = [one.replace(f"{copy}/", "").replace(str(copy), "the copy") for one in found]
    raise DataError(
        f"nothing is written: {whose} {len(errors)} error(s) that --fix can't correct. Correct them, then run the check"
        " again:\n  " + "\n  ".join(found)
    )


class _Plan:
    """The content of the copy: images and annotations by split, categories, and the changes without a finding."""

    def __init__(self, examination: Examination, remove_leaked: bool) -> None:
        self.changes: list[Change] = []
        self._examination = examination
        self._category = _merged_categories(examination)
        leaked = _leaked_images(examination) if remove_leaked else {}
        for (split, image_id), (kept_split, kept_id) in leaked.items():
            self._note(split, "leakage", image_id, f"removed: image {kept_id} of {kept_split!r} is the same")
        self.contents = {
            split: self._content(split, [scan for scan in scans if (split, scan.entry["id"]) not in leaked])
            for split, scans in examination.scans.items()
        }
        if any(finding.kind == "held-out" for finding in examination.findings):
            self._hold_out()
        used = {entry["category_id"] for content in self.contents.values() for entry in content["annotations"]}
        self.categories = [{"id": one.id, "name": one.name} for one in examination.categories if one.id in used]

    def _hold_out(self) -> None:
        """Choose the validation images again if no remaining one has an object."""
        train, valid = self.contents["train"], self.contents["valid"]
        if any(not entry["iscrowd"] for entry in valid["annotations"]):
            return
        images, annotations = train["images"] + valid["images"], train["annotations"] + valid["annotations"]
        targets = {entry["image_id"] for entry in annotations if not entry["iscrowd"]}
        chosen = held_out([image["file_name"] for image in images], [image["id"] in targets for image in images])
        ids = {images[index]["id"] for index in chosen}
        for split, inside in (("train", False), ("valid", True)):
            self.contents[split] = {
                "images": [image for image in images if (image["id"] in ids) is inside],
                "annotations": [entry for entry in annotations if (entry["image_id"] in ids) is inside],
            }

    def _note(self, split: str, kind: str, key: object, change: str) -> None:
        name = self._examination.splits[split].name
        self.changes.append({"file": name, "finding": kind, "id": key, "change": change})

    def _content(self, split: str, scans: Sequence[Scan]) -> dict[str, list[Entry]]:
        raw = {entry["id"]: entry for group in self._examination.splits[split].annotations.values() for entry in group}
        by_id = {int(scan.entry["id"]): scan for scan in scans}
        objects = {key: self._distinct(scan.objects) for key, scan in by_id.items()}
        for group in self._examination.duplicates:
            self._merge(split, sorted(key for name, key in group if name == split and key in by_id), by_id, objects)
        return {
            "images": [by_id[key].entry for key in objects],
            "annotations": [
                {**_corrected_annotation(one, raw[one["id"]], self._category), "image_id": key}
                for key, found in objects.items()
                for one in found
            ],
        }

    def _distinct(self, objects: Sequence[Entry]) -> list[Entry]:
        """The objects with a pixel, each class and mask once."""
        first: dict[tuple[object, ...], Entry] = {}
        for one in objects:
            if one["mask_area"]:
                first.setdefault((one["counts"], self._category[one["category_id"]], one["iscrowd"]), one)
        return list(first.values())

    def _merge(
        self, split: str, group: Sequence[int], scans: Mapping[int, Scan], objects: dict[int, list[Entry]]
    ) -> None:
        """Remove images of a group that looks the same from `objects` by image id; their own objects are moved.

        An image is removed for one with the same pixels, or for the first of the group if it is the same in detail and
        has all of its objects: they can't be moved to an image with other pixels.
        """
        kept: dict[bytes, int] = {}
        for other in group:
            scan, digest = scans[other], scans[other].facts.digest
            same = kept.get(digest, group[0])
            moved = [one for one in objects[other] if not self._is_among(one, scan, objects[same], scans[same])]
            if digest not in kept and (other == same or moved or not _same_in_detail(scans[same], scan)):
                kept[digest] = other
                continue
            objects[same] += moved
            gone = [one["id"] for one in objects.pop(other) if one not in moved]
            what = f"removed: image {same} of {split!r} is the same"
            what += f"; annotations moved to it: {listed([one['id'] for one in moved])}" if moved else ""
            self._note(split, "duplicate-image", other, what)
            for key in gone:
                self._note(split, "duplicate-image", key, f"annotation removed: image {same} has the same object")

    def _is_among(self, one: Entry, scan: Scan, others: Sequence[Entry], of: Scan) -> bool:
        """Whether an object of an image is among the objects of its duplicate, perhaps at another scale."""
        box = _relative_box(one, scan)
        return any(
            self._category[one["category_id"]] == self._category[other["category_id"]]
            and one["iscrowd"] == other["iscrowd"]
            and _same_box(box, _relative_box(other, of))
            for other in others
        )


def _relative_box(one: Entry, scan: Scan) -> list[float]:
    x, y, width, height = one["mask_box"]
    across, down = scan.entry["width"], scan.entry["height"]
    return [x / across, y / down, (x + width) / across, (y + height) / down]


def _same_box(box: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes (left, top, right, bottom) in shares of the image's sides are those of one object."""
    if max(abs(a - b) for a, b in zip(box, other, strict=True)) >= _SAME_BOX:
        return False
    width, height = (min(box[k + 2], other[k + 2]) - max(box[k], other[k]) for k in (0, 1))
    shared = max(0, width) * max(0, height)
    areas = ((right - left) * (bottom - top) for left, top, right, bottom in (box, other))
    return shared >= _SAME_BOX_IOU * (sum(areas) - shared)


def _same_in_detail(first: Scan, second: Scan) -> bool:
    return same_in_detail(*(read_image(scan.row()) for scan in (first, second)))


def _leaked_images(examination: Examination) -> dict[ImageKey, ImageKey]:
    """Image to remove -> the same image in another split, which is kept (by `_KEEP_ORDER`)."""
    scans = {(split, int(scan.entry["id"])): scan for split, found in examination.scans.items() for scan in found}
    removed: dict[ImageKey, ImageKey] = {}
    for group in examination.duplicates:
        kept: list[ImageKey] = []
        for key in sorted(group, key=lambda key: (_KEEP_ORDER.index(key[0]), key[1])):
            same = next(
                (
                    other
                    for other in kept[:20]
                    if other[0] != key[0]
                    and (
                        scans[other].facts.digest == scans[key].facts.digest
                        or _same_in_detail(scans[other], scans[key])
                    )
                ),
                None,
            )
            if same is None:
                kept.append(key)
            else:
                removed[key] = same
    return removed


def _merged_categories(examination: Examination) -> dict[int, int]:
    """Category id -> the smallest id with the same name."""
    first: dict[str, int] = {}
    return {one.id: first.setdefault(normalized_name(one.name), one.id) for one in examination.categories}


def _corrected_annotation(one: Entry, raw: Entry, merged: Mapping[int, int]) -> Entry:
    """The annotation as in its file, with a box and an area that match its mask."""
    findings = one["findings"]
    return {
        **raw,
        "category_id": merged[one["category_id"]],
        "bbox": one["mask_box"] if "box-mismatch" in findings else one["bbox"],
        "area": one["mask_area"] if "area-mismatch" in findings else one["area"],
        "iscrowd": int(one["iscrowd"] and "brush-crowd" not in findings),
    }


def _write_corrected(examination: Examination, split: str, content: Mapping[str, list[Entry]], folder: Path) -> None:
    for image in content["images"]:
        path = folder / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        source = examination.splits[split].source(image)
        if source["bytes"] is None:
            shutil.copyfile(source["path"], path)
        else:
            path.write_bytes(source["bytes"])
    (folder / "_annotations.coco.json").write_text(json.dumps(content, default=_as_json), encoding="utf-8")


def _as_json(value: "bytes | array[float]") -> str | list[float]:
    """The counts of an RLE or the numbers of a packed polygon, as a COCO file has them."""
    return value.decode("ascii") if isinstance(value, bytes) else value.tolist()


def _finding_changes(examination: Examination) -> Iterator[Change]:
    """One change for each id of each finding that is corrected, duplicates apart."""
    for finding in examination.findings:
        fix = "" if finding.kind in _DUPLICATE_KINDS else KINDS[finding.kind].fix
        for key in finding.ids if fix else ():
            yield {"file": finding.file, "finding": finding.kind, "id": key, "change": fix}


def _compared(examination: Examination, plan: _Plan, changes: list[Change]) -> Repair:
    """Compare the copy with the original by split."""
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    left_out: dict[str, dict[str, list[int | str]]] = {}
    known, written, reported = _Ids(), _Ids(), _Ids()  # by file: a held-out split is of the same file as train
    for split, annotations in examination.splits.items():
        known.add(annotations.name, "images", (image["id"] for image in annotations.images))
        known.add(annotations.name, "annotations", (entry["id"] for entry in _entries(annotations)))
        for what, entries in plan.contents[split].items():
            written.add(annotations.name, what, (entry["id"] for entry in entries))
    for finding in examination.findings:
        for what, kinds in (("images", _LOST_IMAGES), ("annotations", _LOST_OBJECTS)):
            reported.add(finding.file, what, finding.ids if finding.kind in kinds else ())
    for split, annotations in examination.splits.items():
        content, name, entries = plan.contents[split], annotations.name, _entries(annotations)
        is_first = split == next(key for key, other in examination.splits.items() if other.name == name)
        ids: dict[str, list[int | str]] = {
            "images": [image["id"] for image in annotations.images],
            "annotations": [entry["id"] for entry in entries],
        }
        if is_first:
            ids["annotations"] += annotations.left_out
            for what in ids:
                ids[what] += [key for key in reported[name, what] if key not in known[name, what]]
        left_out[split] = {
            what: [key for key in dict.fromkeys(found) if key not in written[name, what]] for what, found in ids.items()
        }
        counts[split] = {
            "images": _before_and_after(content["images"], left_out[split]["images"]),
            "objects": _before_and_after(content["annotations"], left_out[split]["annotations"]),
            "classes": (
                len({entry["category_id"] for entry in entries}),
                len({entry["category_id"] for entry in content["annotations"]}),
            ),
        }
    dropped = [split for split, content in plan.contents.items() if not content["images"]]
    dropped += [str(key) for one in examination.findings if one.kind == "test-left-out" for key in one.ids]
    return Repair(changes, counts, left_out, dropped)


class _Ids(dict[tuple[str, str], dict[int | str, None]]):
    """Ids in order, by file and by "images" or "annotations"."""

    def add(self, file: str, what: str, ids: Iterable[int | str]) -> None:
        self.setdefault((file, what), {}).update(dict.fromkeys(ids))

    def __missing__(self, key: tuple[str, str]) -> dict[int | str, None]:
        return {}


def _entries(annotations: SplitAnnotations) -> list[Entry]:
    return [entry for group in annotations.annotations.values() for entry in group]


def _before_and_after(kept: Sequence[Entry], left_out: Sequence[object]) -> tuple[int, int]:
    return len(kept) + len(left_out), len(kept)
