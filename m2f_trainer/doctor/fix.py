"""`m2f check --fix`: write a corrected copy of a dataset and a list of every change. The original is only read."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from m2f_trainer.data.categories import normalized_name
from m2f_trainer.data.coco_json import Entry
from m2f_trainer.data.images import open_image
from m2f_trainer.data.problems import KINDS
from m2f_trainer.doctor.duplicates import same_in_detail
from m2f_trainer.doctor.examine import Examination, ImageKey
from m2f_trainer.doctor.scan import Scan
from m2f_trainer.errors import DataError

CHANGES = "changes.json"
_DUPLICATE_KINDS = ("duplicate-image", "leakage")
_KEEP_ORDER = ("test", "valid", "train")  # an image in several splits stays in the first of these

Change: TypeAlias = dict[str, Any]


def repair(examination: Examination, target: Path) -> list[Change]:
    """Write `target`/<split>/_annotations.coco.json with images beside it, and `target`/changes.json.

    Raises:
        DataError: `target` is not empty, or lies inside the dataset
    """
    root = Path(examination.dataset).resolve()
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise DataError(f"{target}: expected a new or empty folder for the corrected copy. Name another one.")
    if target.resolve().is_relative_to(root):
        raise DataError(f"{target}: expected a folder outside the dataset {root}. Name another one.")
    removed = _duplicates_to_remove(examination)
    merged = _merged_categories(examination)
    contents = {
        split: _corrected_split(
            examination, split, [scan for scan in scans if (split, scan.entry["id"]) not in removed], merged
        )
        for split, scans in examination.scans.items()
    }
    used = {entry["category_id"] for content in contents.values() for entry in content["annotations"]}
    categories = [{"id": one.id, "name": one.name} for one in examination.categories if one.id in used]
    for split, content in contents.items():
        if content["images"]:
            _write_corrected(examination, split, {**content, "categories": categories}, target / split)
    changes = [*_finding_changes(examination), *_duplicate_changes(examination, removed)]
    target.mkdir(parents=True, exist_ok=True)
    (target / CHANGES).write_text(json.dumps(changes, indent=1, ensure_ascii=False), encoding="utf-8")
    return changes


def _duplicates_to_remove(examination: Examination) -> dict[ImageKey, ImageKey]:
    """Images to remove, each with the duplicate that is kept: across splits, the one used for evaluation."""
    scans = {(split, scan.entry["id"]): scan for split, found in examination.scans.items() for scan in found}
    removed: dict[ImageKey, ImageKey] = {}
    for group in examination.duplicates:
        first, *others = sorted(group, key=lambda key: (_KEEP_ORDER.index(key[0]), key[1]))
        kept = {scans[first].facts.digest: first}
        for other in others:
            same_pixels = kept.setdefault(scans[other].facts.digest, other)
            if same_pixels != other:
                removed[other] = same_pixels
            elif same_in_detail(*(open_image(scans[key].source, f"image {key[1]}") for key in (first, other))):
                removed[other] = first
    return removed


def _merged_categories(examination: Examination) -> dict[int, int]:
    """Category id -> the smallest id with the same name."""
    first: dict[str, int] = {}
    return {one.id: first.setdefault(normalized_name(one.name), one.id) for one in examination.categories}


def _corrected_split(
    examination: Examination, split: str, scans: Sequence[Scan], merged: Mapping[int, int]
) -> dict[str, list[Entry]]:
    raw = {entry["id"]: entry for group in examination.splits[split].annotations.values() for entry in group}
    objects = [one for scan in scans for one in scan.objects if one["mask_area"]]
    return {
        "images": [scan.entry for scan in scans],
        "annotations": [_corrected_annotation(one, raw[one["id"]], merged) for one in objects],
    }


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
    (folder / "_annotations.coco.json").write_text(json.dumps(content, default=list), encoding="utf-8")


def _finding_changes(examination: Examination) -> Iterator[Change]:
    """One change for each id of each finding that is corrected, duplicates apart."""
    for finding in examination.findings:
        fix = "" if finding.kind in _DUPLICATE_KINDS else KINDS[finding.kind].fix
        for key in finding.ids if fix else ():
            yield {"file": finding.file, "finding": finding.kind, "id": key, "change": fix}


def _duplicate_changes(examination: Examination, removed: Mapping[ImageKey, ImageKey]) -> Iterator[Change]:
    for (split, image_id), (kept_split, kept_id) in removed.items():
        change = f"removed: image {kept_id} of {kept_split!r} is the same"
        kind = "duplicate-image" if split == kept_split else "leakage"
        yield {"file": examination.splits[split].name, "finding": kind, "id": image_id, "change": change}
