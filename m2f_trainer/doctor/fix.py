"""A corrected copy of a dataset, and the list of every change. The original is read only."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from m2f_trainer.data.coco_json import Entry
from m2f_trainer.data.dataset import folded
from m2f_trainer.data.images import open_image
from m2f_trainer.data.problems import KINDS
from m2f_trainer.doctor.duplicates import same_in_detail
from m2f_trainer.doctor.examine import Examination, Place
from m2f_trainer.doctor.scan import Scan
from m2f_trainer.errors import DataError

CHANGES = "changes.json"
COPY_KINDS = ("duplicate-image", "leakage")
_STAYING = ("test", "valid", "train")  # which of two splits keeps an image that is in both

Change: TypeAlias = dict[str, Any]


def repair(examination: Examination, target: Path) -> list[Change]:
    """Writes `target`/<split>/_annotations.coco.json with images beside it, and `target`/changes.json.

    Raises:
        DataError: `target` has something in it, or lies in the dataset
    """
    root = examination.root.resolve()
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise DataError(f"{target}: expected a new or empty folder for the corrected copy. Name another one.")
    if target.resolve().is_relative_to(root):
        raise DataError(f"{target}: expected a folder outside the dataset {root}. Name another one.")
    dropped = _second_copies(examination)
    merged = _merged_categories(examination)
    contents = {
        split: _content(
            examination, split, [scan for scan in scans if (split, scan.entry["id"]) not in dropped], merged
        )
        for split, scans in examination.scans.items()
    }
    used = {entry["category_id"] for content in contents.values() for entry in content["annotations"]}
    categories = [{"id": one.id, "name": one.name} for one in examination.categories if one.id in used]
    for split, content in contents.items():
        if content["images"]:
            _write_split(examination, split, {**content, "categories": categories}, target / split)
    changes = [*_changes(examination), *_copy_changes(examination, dropped)]
    target.mkdir(parents=True, exist_ok=True)
    (target / CHANGES).write_text(json.dumps(changes, indent=1, ensure_ascii=False), encoding="utf-8")
    return changes


def _changes(examination: Examination) -> Iterator[Change]:
    """One for each id of each finding that is corrected here; copies are told on their own."""
    for finding in examination.findings:
        fix = "" if finding.kind in COPY_KINDS else KINDS[finding.kind].fix
        for key in finding.ids if fix else ():
            yield {"file": finding.file, "finding": finding.kind, "id": key, "change": fix}


def _copy_changes(examination: Examination, dropped: Mapping[Place, Place]) -> Iterator[Change]:
    for (split, number), (other_split, other) in dropped.items():
        change = f"left out: image {other} of {other_split!r} shows the same"
        kind = "duplicate-image" if split == other_split else "leakage"
        yield {"file": str(examination.files[split].path), "finding": kind, "id": number, "change": change}


def _second_copies(examination: Examination) -> dict[Place, Place]:
    """Images to leave out, each with the copy that stays: across splits, the one that scores."""
    scans = {(split, scan.entry["id"]): scan for split, found in examination.scans.items() for scan in found}
    dropped: dict[Place, Place] = {}
    for group in examination.copies:
        first, *others = sorted(group, key=lambda place: (_STAYING.index(place[0]), place[1]))
        staying = {scans[first].look.digest: first}
        for other in others:
            twin = staying.setdefault(scans[other].look.digest, other)
            if twin != other:
                dropped[other] = twin
            elif same_in_detail(*(open_image(scans[place].source, f"image {place[1]}") for place in (first, other))):
                dropped[other] = first
    return dropped


def _merged_categories(examination: Examination) -> dict[int, int]:
    """Category id -> the smallest id of the same name."""
    first: dict[str, int] = {}
    return {one.id: first.setdefault(folded(one.name), one.id) for one in examination.categories}


def _content(
    examination: Examination, split: str, scans: Sequence[Scan], merged: Mapping[int, int]
) -> dict[str, list[Entry]]:
    raw = {entry["id"]: entry for group in examination.files[split].annotations.values() for entry in group}
    objects = [one for scan in scans for one in scan.objects if one["mask_area"]]
    return {
        "images": [scan.entry for scan in scans],
        "annotations": [_corrected(one, raw[one["id"]], merged) for one in objects],
    }


def _corrected(one: Entry, raw: Entry, merged: Mapping[int, int]) -> Entry:
    """The annotation as its file has it, with box and area that fit its mask."""
    flaws = one["flaws"]
    return {
        **raw,
        "category_id": merged[one["category_id"]],
        "bbox": one["mask_box"] if "box-mismatch" in flaws else one["bbox"],
        "area": one["mask_area"] if "area-mismatch" in flaws else one["area"],
        "iscrowd": int(one["iscrowd"] and "brush-crowd" not in flaws),
    }


def _write_split(examination: Examination, split: str, content: Mapping[str, list[Entry]], folder: Path) -> None:
    file = examination.files[split]
    for image in content["images"]:
        path = folder / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        source = file.source(image)
        if source["bytes"] is None:
            shutil.copyfile(source["path"], path)
        else:
            path.write_bytes(source["bytes"])
    (folder / "_annotations.coco.json").write_text(json.dumps(content, default=list), encoding="utf-8")
