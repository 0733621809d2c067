"""Statistics of a dataset and its findings, as the text and the JSON of `m2f check`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2f_trainer.data.problems import KINDS, Finding, label_text, listed
from m2f_trainer.doctor.examine import Examination
from m2f_trainer.doctor.model_input import MASK_STRIDE
from m2f_trainer.doctor.scan import Scan
from m2f_trainer.errors import printable

_SHOWN_CLASSES = 30
_RAREST = 10
_RARE = 0.01
"""A class in less than this fraction of the training images is rare."""


def figures(examination: Examination) -> dict[str, Any]:
    """Statistics of splits, classes, instances per image, object sizes and image sizes."""
    splits = {split: _split_counts(scans) for split, scans in examination.scans.items()}
    return {
        "splits": splits,
        "classes": class_counts(examination),
        "rarest_classes": rarest_classes(examination),
        "instances_per_image": _percentiles(instances_per_image(examination)),
        "num_queries": examination.seen.num_queries or "auto",
        "input_size": [examination.seen.height, examination.seen.width],
        "tile_size": examination.seen.tile_size,
        "object_side_at_input": _percentiles(object_sides(examination)),
        "image_sizes": image_sizes(examination)[:20],
    }


def every_image(examination: Examination) -> Iterator[Scan]:
    """The usable images of all splits."""
    for scans in examination.scans.values():
        yield from scans


def instances_per_image(examination: Examination) -> list[int]:
    """The number of objects of each image, without crowd regions."""
    return [len(scan.targets) for scan in every_image(examination)]


def object_sides(examination: Examination) -> list[float]:
    """The square root of each object's area in pixels at the input size."""
    sides = []
    for scan in every_image(examination):
        down, across = examination.seen.scales((scan.entry["height"], scan.entry["width"]))
        sides += [(one["mask_area"] * down * across) ** 0.5 for one in scan.targets if one["mask_area"]]
    return sides


def image_sizes(examination: Examination) -> list[tuple[str, int]]:
    """("width x height", number of images), the most frequent first."""
    return Counter(f"{scan.entry['width']}x{scan.entry['height']}" for scan in every_image(examination)).most_common()


def rarest_classes(examination: Examination) -> list[tuple[str, int, int]]:
    """(class name, objects, images with it) in the training split, the classes in the fewest images first."""
    objects, images = Counter[int](), Counter[int]()
    for scan in examination.scans.get("train", ()):
        ids = [one["category_id"] for one in scan.targets]
        objects.update(ids)
        images.update(set(ids))
    label = _labels(examination)
    rows = [(label[one.id], objects[one.id], images[one.id]) for one in examination.categories]
    return sorted(rows, key=lambda row: (row[2], row[1]))


def _labels(examination: Examination) -> dict[int, str]:
    """Category id -> its name, with the id where two have the same."""
    names = Counter(category.name for category in examination.categories)
    return {one.id: one.name if names[one.name] == 1 else f"{one.name} [{one.id}]" for one in examination.categories}


def class_counts(examination: Examination) -> dict[str, dict[str, int]]:
    """Class name -> split -> instances without crowd regions; where two classes have the same name, ids are added."""
    label = _labels(examination)
    table = {label[one.id]: dict.fromkeys(examination.scans, 0) for one in examination.categories}
    for split, scans in examination.scans.items():
        for category_id, count in Counter(one["category_id"] for scan in scans for one in scan.targets).items():
            table[label[category_id]][split] = count
    return table


def to_json(examination: Examination) -> str:
    """The whole result as JSON."""
    findings = [{**finding.to_json(), "file": relative_file(finding, examination)} for finding in examination.findings]
    result = {"dataset": examination.dataset, "status": examination.status, "summary": figures(examination)}
    return json.dumps({**result, "findings": findings}, indent=1)


def summary_text(examination: Examination) -> str:
    """The whole result for a terminal."""
    parts = [*(_summary_lines(examination) if examination.status < 2 else []), ""]
    for finding in examination.findings:
        parts += _finding_lines(finding, examination)
    return "\n".join([*parts, verdict(examination)])


def verdict(examination: Examination) -> str:
    """One line: the number of errors and warnings, and whether training accepts the dataset."""
    counts = Counter(finding.severity for finding in examination.findings)
    total = ", ".join(f"{counts[kind] or 'no'} {kind}{'s' * (counts[kind] != 1)}" for kind in ("error", "warning"))
    meaning = ("training can start", "training would stop with these errors", "nothing in it can be used")
    return f"{total}: {meaning[examination.status]}."


def relative_file(finding: Finding, examination: Examination) -> str:
    """The file of a finding, relative to the dataset folder where it lies inside it."""
    path = Path(finding.file)
    inside = path.is_relative_to(examination.dataset) and path != Path(examination.dataset)
    return str(path.relative_to(examination.dataset)) if inside else finding.file


def _summary_lines(examination: Examination) -> Iterator[str]:
    summary = figures(examination)
    yield f"{'split':8}{'images':>9}{'empty':>8}{'objects':>10}{'crowds':>8}"
    for split, row in summary["splits"].items():
        yield f"{split:8}{row['images']:9}{row['empty']:8}{row['instances']:10}{row['crowds']:8}"
    per_image, sides, seen = summary["instances_per_image"], summary["object_side_at_input"], examination.seen
    yield (
        f"objects per image: median {per_image['p50']:g}, 99 % have at most {per_image['p99']:.0f},"
        f" maximum {per_image['max']:g}" + f"; the model has {seen.num_queries} queries" * bool(seen.num_queries)
    )
    yield (
        f"object side at {seen}: median {sides['p50']:.0f} px, 1 % under {sides['p1']:.0f} px;"
        f" a cell of the mask logits is {MASK_STRIDE} px"
    )
    sizes = summary["image_sizes"]
    yield "image sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes[:5]) + ", ..." * (len(sizes) > 5)
    yield f"{len(summary['classes'])} class{'es' * (len(summary['classes']) != 1)}:"
    ordered = sorted(summary["classes"].items(), key=lambda item: -sum(item[1].values()))
    shown = [(label_text(name), counts) for name, counts in ordered[:_SHOWN_CLASSES]]
    widest = max((len(name) for name, _ in shown), default=0)
    for name, counts in shown:
        yield f"  {name:{max(24, widest + 2)}}" + "  ".join(f"{split} {count}" for split, count in counts.items())
    if len(ordered) > _SHOWN_CLASSES:
        yield f"  ... and {len(ordered) - _SHOWN_CLASSES} more"
    yield from _rarest_lines(summary["rarest_classes"], summary["splits"].get("train", {}).get("images", 0))


def _rarest_lines(rarest: Sequence[tuple[str, int, int]], images: int) -> Iterator[str]:
    """The rarest classes of the training split, and what can be done about them."""
    total = len(rarest)
    if total < 2 or not images:
        return
    rarest = [row for row in rarest if row[2]]  # classes without training images are reported as missing
    shown = [f"{label_text(name)} in {of_them:,} ({objects:,} objects)" for name, objects, of_them in rarest[:_RAREST]]
    yield f"rarest classes, in how many of {images:,} training images: {', '.join(shown)}"
    rare = sum(of_them < _RARE * images for _, _, of_them in rarest)
    if rare:
        yield (
            f"  {rare} of {total} classes are in less than {100 * _RARE:g} % of the training images; to train"
            f" more on them: m2f train --repeat_factor_threshold {_RARE:g}, or --class_weights balanced"
        )


def _finding_lines(finding: Finding, examination: Examination) -> list[str]:
    kind = KINDS[finding.kind]
    ids = f", ids {listed(finding.ids)}" if finding.ids else ""
    if kind.severity == "note":
        where = relative_file(finding, examination)
        return [f"note: {kind.title}: {finding.count} in {where}: {printable(finding.message)}", ""]
    return [
        f"{finding.severity}: {kind.title}: {finding.count} in {relative_file(finding, examination)}{printable(ids)}",
        f"    {printable(finding.message)}",
        f"    why it matters: {kind.why} What to do: {kind.remedy}" + (f" --fix: {kind.fix}." if kind.fix else ""),
        "",
    ]


def _split_counts(scans: Sequence[Scan]) -> dict[str, int]:
    targets = [len(scan.targets) for scan in scans]
    crowds = sum(len(scan.objects) for scan in scans) - sum(targets)
    return {"images": len(scans), "empty": targets.count(0), "instances": sum(targets), "crowds": crowds}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 1st, 50th and 99th percentile, and the maximum."""
    if not values:
        return {"p1": 0.0, "p50": 0.0, "p99": 0.0, "max": 0.0}
    p1, p50, p99 = np.percentile(values, (1, 50, 99)).tolist()
    return {"p1": round(p1, 2), "p50": round(p50, 2), "p99": round(p99, 2), "max": round(max(values), 2)}
