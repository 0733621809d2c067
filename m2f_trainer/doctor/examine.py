"""`m2f check`: read a whole dataset and collect all problems, continuing after each one if possible."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from m2f_trainer.config.arguments import parse_pixel_range, pixel_range_text
from m2f_trainer.data.categories import normalized_name
from m2f_trainer.data.dataset import (
    Category,
    used_categories,
    with_reading,
    with_validation,
)
from m2f_trainer.data.formats import find_splits, read_optional
from m2f_trainer.data.hub_dataset import check_no_files, is_hub_dataset, read_hub
from m2f_trainer.data.images import FEWEST_LEVELS, FULL_RANGE
from m2f_trainer.data.layouts import split_paths
from m2f_trainer.data.problems import Finding, Findings, Report, listed
from m2f_trainer.data.splits import SplitAnnotations
from m2f_trainer.doctor.duplicates import find_duplicates
from m2f_trainer.doctor.model_input import ModelInput, model_input, report_misfits
from m2f_trainer.doctor.scan import Scan, Settings, scan_split
from m2f_trainer.errors import DataError

CLEAN, ERRORS, UNUSABLE = 0, 1, 2

ImageKey: TypeAlias = tuple[str, int]
"""Split and image id."""


@dataclass(frozen=True)
class Examination:
    """The result of `examine`.

    Attributes:
        dataset: the folder, or the name on the Hub
        settings: the recipe's fields that findings depend on
        seen: what a model sees of the images; findings about small and many objects depend on it
        splits: the annotations of each split that could be read
        scans: the usable images of each split
        categories: the classes of a model trained on it
        findings: all problems, errors first
        duplicates: groups of images that look the same
        files: which files and folders the splits were read from, "" for a dataset on the Hub
    """

    dataset: str
    settings: Settings
    seen: ModelInput
    splits: Mapping[str, SplitAnnotations]
    scans: Mapping[str, list[Scan]]
    categories: tuple[Category, ...]
    findings: tuple[Finding, ...]
    duplicates: tuple[tuple[ImageKey, ...], ...] = ()
    files: str = ""

    @property
    def status(self) -> int:
        """The exit status of `m2f check`: 0 without errors (warnings are allowed), 1 with errors, 2 where no image can
        be used.
        """
        if not any(self.scans.values()):
            return UNUSABLE
        return ERRORS if any(finding.severity == "error" for finding in self.findings) else CLEAN


def examine(
    dataset: str | Path,
    settings: Settings | None = None,
    annotations: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    progress: bool = False,
) -> Examination:
    """Read every annotation and every image of a dataset, as `load_dataset` finds it.

    All problems become findings; none is raised. `progress`: whether to show a bar on a terminal.
    """
    settings, report, name = settings or Settings(), Findings(), str(dataset)
    splits, files = _read_splits(name, annotations, images, settings, report)
    splits, categories = used_categories(splits, report) if splits else ({}, [])
    chosen = parse_pixel_range(settings.pixel_range)
    splits = with_reading(splits, settings.exif_frame, chosen, report)
    if chosen == "auto":
        _report_found_range(name, splits, report)
    total = sum(len(annotations.images) for annotations in splits.values())
    with tqdm(total=total, desc="check", unit=" images", leave=False, disable=None if progress else True) as bar:
        scans = {split: scan_split(one, report, bar.update) for split, one in splits.items()}
    seen = model_input(settings, scans)
    report_misfits(scans, seen, report)
    duplicates: tuple[tuple[ImageKey, ...], ...] = ()
    if splits:
        _check_splits(name, splits, scans, report)
        _check_class_names(splits, categories, report)
        _check_class_use(splits, scans, categories, report)
        duplicates = _check_duplicates(splits, scans, report)
    findings = tuple(report.sorted())
    return Examination(name, settings, seen, splits, scans, tuple(categories), findings, duplicates, files)


def _read_splits(
    name: str,
    annotations: Sequence[str] | None,
    images: Sequence[str] | None,
    settings: Settings,
    report: Report,
) -> tuple[Mapping[str, SplitAnnotations], str]:
    """The readable splits, with a validation split held out if training would hold one out, and a text about the files
    that they were read from.
    """
    splits: dict[str, SplitAnnotations] = {}
    folders: dict[str, set[Path]] = {}
    try:
        given = split_paths(annotations, "annotations"), split_paths(images, "images")
        if is_hub_dataset(name):
            check_no_files(name, *given)
            return _hold_out(read_hub(name, report, settings.exif_frame), report), ""
        layout = find_splits(name, *given, settings.exif_frame, settings.follow_links)
    except DataError as error:
        report("unusable", name, [], str(error))
        return {}, ""
    for files in layout.splits:
        try:
            found = read_optional(files, report)
            if found is None:
                layout = layout.without([files.split])
                continue
            splits[files.split] = found
            folders[files.split] = set(_folders(found))
        except DataError as error:
            report("unusable", files.annotations, [], str(error))
    read_from = layout.describe(folders)
    return _hold_out(splits, report) if len(splits) == len(layout.splits) else splits, read_from


def _report_found_range(name: str, splits: Mapping[str, SplitAnnotations], report: Report) -> None:
    """Report the range of values that was found, where the full range of 16 bits would leave few grey levels."""
    for found in {split.reading.pixel_range for split in splits.values()}:
        if found is None or found == "image":
            continue
        levels = math.floor((found[1] - found[0]) / (FULL_RANGE[1] - FULL_RANGE[0]) * 256) + 1
        if levels < FEWEST_LEVELS:
            message = (
                f"the values of its images lie between {found[0]:g} and {found[1]:g}, of which the full range of 16"
                f" bits would leave {levels} grey levels. They are scaled as by --pixel_range"
                f" {pixel_range_text(found)}, which m2f train finds in the same way and stores in the model."
            )
            report("pixel-range", name, [], message)


def _folders(split: SplitAnnotations) -> Iterator[Path]:
    """The folder of each image whose file name is allowed."""
    for image in split.images:
        with contextlib.suppress(DataError):  # reported when the image is examined
            yield Path(split.source(image)["path"]).parent


def _hold_out(splits: Mapping[str, SplitAnnotations], report: Report) -> dict[str, SplitAnnotations]:
    """The splits; if there is no validation split, one is held out, which is reported."""
    found = with_validation(splits)
    if len(found) > len(splits):
        ids, total = [image["id"] for image in found["valid"].images], len(splits["train"].images)
        message = f"found no split 'valid': {len(ids)} of {total} training images are held out."
        report("held-out", found["train"].name, ids, message)
    return found


def _check_splits(
    name: str, splits: Mapping[str, SplitAnnotations], scans: Mapping[str, list[Scan]], report: Report
) -> None:
    """Report a missing train or valid split, and splits without objects."""
    for split in ("train", "valid"):
        if not scans.get(split):
            found = ", ".join(key for key in scans if scans[key]) or "none"
            report("missing-split", name, [split], f"expected a split {split!r} with usable images, found {found}.")
    splits_have_objects = any(split.used_categories() for split in splits.values())  # reported before otherwise
    for split, images in scans.items():
        if split != "test" and images and splits_have_objects and not any(scan.targets for scan in images):
            message = f"split {split!r}: expected objects, found only crowd regions or none."
            report("no-objects", splits[split].name, [split], message)


def _check_class_names(splits: Mapping[str, SplitAnnotations], categories: list[Category], report: Report) -> None:
    """Report categories whose names differ only in case and spaces."""
    declared_in = _declared_categories(splits)
    by_name: dict[str, list[Category]] = {}
    for category in categories:
        by_name.setdefault(normalized_name(category.name), []).append(category)
    for same in by_name.values():
        if len({one.name.strip() for one in same}) > 1:
            ids = [one.id for one in same]
            message = f"categories {listed(ids)} are named {listed([repr(one.name) for one in same])}."
            report("duplicate-category-name", declared_in[ids[0]][1], ids, message)


def _check_class_use(
    splits: Mapping[str, SplitAnnotations],
    scans: Mapping[str, list[Scan]],
    categories: list[Category],
    report: Report,
) -> None:
    """Report classes that a split lacks, and categories without annotations."""
    for split, annotations in splits.items():
        present = {one["category_id"] for scan in scans[split] for one in scan.targets}
        missing = [category for category in categories if category.id not in present]
        if missing and scans[split] and (present or split == "test"):
            names = listed([category.name for category in missing])
            message = f"split {split!r}: no object of {len(missing)} of {len(categories)} classes: {names}."
            report("missing-class", annotations.name, [category.id for category in missing], message)
    declared = _declared_categories(splits)
    for key in sorted(set(declared) - {category.id for category in categories}):
        name, file = declared[key]
        report("unused-category", file, [key], f"category {key} ({name}) has no annotation in any split.")


def _declared_categories(splits: Mapping[str, SplitAnnotations]) -> dict[int, tuple[str, str]]:
    """Category id -> its name, and the last split's file that declares it."""
    return {key: (name, split.name) for split in splits.values() for key, name in split.categories.items()}


def _check_duplicates(
    splits: Mapping[str, SplitAnnotations], scans: Mapping[str, list[Scan]], report: Report
) -> tuple[tuple[ImageKey, ...], ...]:
    """Groups of images that look the same, within a split and across splits; every copy is reported."""
    images = [(split, scan) for split, found in scans.items() for scan in found]
    groups: dict[int, list[int]] = {}
    first_of: dict[int, int] = {}
    for i, j in find_duplicates([scan.facts for _, scan in images]):
        first_of[j] = first_of.get(i, i)
        groups.setdefault(first_of[j], [first_of[j]]).append(j)
        (first_split, first), (split, scan) = images[first_of[j]], images[j]
        kind = "duplicate-image" if split == first_split else "leakage"
        message = (
            f"image {scan.entry['id']} ({scan.entry['file_name']}) of {split!r} looks the same as image"
            f" {first.entry['id']} ({first.entry['file_name']}) of {first_split!r}."
        )
        report(kind, splits[split].name, [scan.entry["id"]], message, scan.entry["id"])
    return tuple(tuple((images[k][0], int(images[k][1].entry["id"])) for k in group) for group in groups.values())
