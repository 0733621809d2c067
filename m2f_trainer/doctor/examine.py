"""The dataset doctor behind `m2f check`: reads all of a dataset, tells all that is wrong, and goes on where it can."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from m2f_trainer.data.coco_json import AnnotationFile
from m2f_trainer.data.dataset import Category, find_splits, folded, read_split, used_categories, with_validation
from m2f_trainer.data.hub_dataset import is_hub_set, read_hub
from m2f_trainer.data.problems import Finding, Findings, Report, some
from m2f_trainer.doctor.duplicates import same_pictures
from m2f_trainer.doctor.scan import Scan, Settings, scan_split
from m2f_trainer.errors import DataError

CLEAN, ERRORS, UNUSABLE = 0, 1, 2

Place: TypeAlias = tuple[str, int]  # split and image id


@dataclass(frozen=True)
class Examination:
    """What the doctor saw: the usable images of each split, the classes, the findings (errors first), and the groups
    of images that show the same.
    """

    root: Path
    settings: Settings
    files: Mapping[str, AnnotationFile]
    scans: Mapping[str, list[Scan]]
    categories: tuple[Category, ...]
    findings: tuple[Finding, ...]
    copies: tuple[tuple[Place, ...], ...] = ()

    @property
    def status(self) -> int:
        """0 clean (warnings are), 1 errors, 2 nothing in it can be used: the exit status of `m2f check`."""
        if not any(self.scans.values()):
            return UNUSABLE
        return ERRORS if any(finding.severity == "error" for finding in self.findings) else CLEAN


def examine(root: str | Path, settings: Settings | None = None) -> Examination:
    """Reads every annotation and every image of a dataset, a folder or `user/name` on the Hub.

    Nothing is raised: all problems are findings.
    """
    settings, report, folder = settings or Settings(), Findings(), Path(root)
    files = _read(folder, report)
    scans = {split: scan_split(file, settings, report) for split, file in files.items()}
    categories = used_categories(files, report) if files else []
    copies: tuple[tuple[Place, ...], ...] = ()
    if files:
        _check_splits(folder, files, scans, report)
        _check_names(files, categories, report)
        _check_use(files, scans, categories, report)
        copies = _check_copies(files, scans, report)
    return Examination(folder, settings, files, scans, tuple(categories), tuple(report.listed()), copies)


def _read(root: Path, report: Report) -> Mapping[str, AnnotationFile]:
    """The splits that can be read, with a validation split held out where training would."""
    files: dict[str, AnnotationFile] = {}
    try:
        if is_hub_set(root):
            return _told(read_hub(str(root), report), report)
        layout = find_splits(root)
    except DataError as error:
        report("unusable", root, [], str(error))
        return {}
    for part in layout:
        try:
            files[part.split] = read_split(part, report)
        except DataError as error:
            report("unusable", part.annotations, [], str(error))
    return _told(files, report) if len(files) == len(layout) else files


def _told(files: Mapping[str, AnnotationFile], report: Report) -> dict[str, AnnotationFile]:
    """The splits, with a validation split held out where there is none."""
    found = with_validation(files)
    if len(found) > len(files):
        ids, path = [image["id"] for image in found["valid"].images], found["train"].path
        of = len(ids) + len(found["train"].images)
        report("held-out", path, ids, f"found no split 'valid': {len(ids)} of {of} training images are held out.")
    return found


def _check_splits(
    root: Path, files: Mapping[str, AnnotationFile], scans: Mapping[str, list[Scan]], report: Report
) -> None:
    """What training asks of the splits."""
    for split in ("train", "valid"):
        if not scans.get(split):
            found = ", ".join(name for name in scans if scans[name]) or "none"
            report("missing-split", root, [split], f"expected a split {split!r} with usable images, found {found}.")
    for split, images in scans.items():
        if split != "test" and images and not any(scan.targets for scan in images):
            message = f"split {split!r}: expected objects, found only crowd regions or none."
            report("no-objects", files[split].path, [split], message)


def _check_use(
    files: Mapping[str, AnnotationFile],
    scans: Mapping[str, list[Scan]],
    categories: list[Category],
    report: Report,
) -> None:
    """Every class has objects in every split, and every category is a class."""
    for split, file in files.items():
        seen = {one["category_id"] for scan in scans[split] for one in scan.targets}
        lacking = [category for category in categories if category.id not in seen]
        if lacking and scans[split] and (seen or split == "test"):
            names = some([category.name for category in lacking])
            message = f"split {split!r}: no object of {len(lacking)} of {len(categories)} classes: {names}."
            report("missing-class", file.path, [category.id for category in lacking], message)
    declared = _declared(files)
    for key in sorted(set(declared) - {category.id for category in categories}):
        name, path = declared[key]
        report("unused-category", path, [key], f"category {key} ({name}) has no annotation in any split.")


def _declared(files: Mapping[str, AnnotationFile]) -> dict[int, tuple[str, Path]]:
    return {key: (name, file.path) for file in files.values() for key, name in file.categories.items()}


def _check_names(files: Mapping[str, AnnotationFile], categories: list[Category], report: Report) -> None:
    declared = _declared(files)
    times = Counter(folded(category.name) for category in categories)
    for name in [name for name, count in times.items() if count > 1]:
        ids = [category.id for category in categories if folded(category.name) == name]
        report("duplicate-category-name", declared[ids[0]][1], ids, f"categories {some(ids)} are all named {name!r}.")


def _check_copies(
    files: Mapping[str, AnnotationFile], scans: Mapping[str, list[Scan]], report: Report
) -> tuple[tuple[Place, ...], ...]:
    """Images that show the same, within a split and across, in groups."""
    found = [(split, scan) for split, images in scans.items() for scan in images]
    groups: dict[int, list[int]] = {}
    first_of: dict[int, int] = {}
    for i, j in same_pictures([scan.look for _, scan in found]):
        first_of[j] = first_of.get(i, i)
        groups.setdefault(first_of[j], [first_of[j]]).append(j)
        (first_split, first), (split, scan) = found[first_of[j]], found[j]
        kind = "duplicate-image" if split == first_split else "leakage"
        message = (
            f"image {scan.entry['id']} ({scan.entry['file_name']}) of {split!r} shows the same as image"
            f" {first.entry['id']} ({first.entry['file_name']}) of {first_split!r}."
        )
        report(kind, files[split].path, [scan.entry["id"]], message, scan.entry["id"])
    return tuple(tuple((found[k][0], int(found[k][1].entry["id"])) for k in group) for group in groups.values())
