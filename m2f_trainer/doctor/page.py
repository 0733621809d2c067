"""The page of `m2f check`: one self-contained HTML file with findings, histograms and pictures, worst cases first."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from m2f_trainer.data.problems import KINDS, label_text, listed
from m2f_trainer.doctor.examine import Examination
from m2f_trainer.doctor.model_input import MASK_STRIDE
from m2f_trainer.doctor.pictures import draw_objects
from m2f_trainer.doctor.scan import Scan
from m2f_trainer.doctor.summary import (
    class_counts,
    figures,
    image_sizes,
    instances_per_image,
    object_sides,
    rarest_classes,
    relative_file,
    verdict,
)
from m2f_trainer.viz.charts import bar_chart
from m2f_trainer.viz.html import Chart, Photo, Table, chart, photo, render_page

MOST_PICTURES = 24
MOST_BARS = 40


def render(examination: Examination) -> str:
    """The text of the page."""
    name = Path(examination.dataset).resolve().name
    return render_page(
        "check.html",
        title=f"m2f check: {name}",
        heading=name,
        verdict=verdict(examination),
        summary=_split_table(examination),
        findings=[
            {
                "kind": KINDS[finding.kind],
                "severity": finding.severity,
                "count": finding.count,
                "message": finding.message,
                "file": relative_file(finding, examination),
                "ids": listed(finding.ids) if finding.ids else "",
            }
            for finding in examination.findings
        ],
        histograms=list(_histograms(examination)),
        pictures=list(_pictures(examination)),
    )


def _split_table(examination: Examination) -> Table:
    columns = ("images", "empty", "instances", "crowds")
    rows = [[split, *(row[key] for key in columns)] for split, row in figures(examination)["splits"].items()]
    return Table(("split", "images", "empty", "objects", "crowds"), rows)


def _histograms(examination: Examination) -> Iterator[Chart]:
    per_image, sides = instances_per_image(examination), object_sides(examination)
    seen = examination.seen
    if per_image:
        queries = f" (the model has {seen.num_queries} queries)" if seen.num_queries else ""
        yield _bars(f"Objects in an image{queries}", _binned(per_image, whole=True))
    if sides:
        title = f"Object side in pixels at {seen}; a mask value covers {MASK_STRIDE}"
        yield _bars(title, _binned(sides, whole=False))
    totals = [(label_text(name), sum(counts.values())) for name, counts in class_counts(examination).items()]
    yield _bars("Objects of each class", sorted(totals, key=lambda item: -item[1]))
    rarest = [
        (f"{label_text(name)} ({count} objects)", images)
        for name, count, images in rarest_classes(examination)[:MOST_BARS]
    ]
    yield _bars("Training images of each class, the rarest first", rarest)
    yield _bars("Image sizes", image_sizes(examination))


def _binned(values: Sequence[float], *, whole: bool) -> list[tuple[str, int]]:
    """(range, count) of 16 bins of equal width, or of equal ratio for sizes."""
    high = max(values)
    if whole:
        edges = np.unique(np.linspace(0, high + 1, min(int(high) + 2, 17)).astype(int)).astype(float)
    else:
        edges = np.geomspace(max(0.5, min(values)), high + 1, 17)
    counts, _ = np.histogram(np.clip(values, edges[0], None), edges)
    labels = [
        f"{low:.0f}" if whole and above - low <= 1 else f"{low:.0f}-{above - whole:.0f}"
        for low, above in pairwise(edges.tolist())
    ]
    return list(zip(labels, counts.tolist(), strict=True))


def _bars(title: str, rows: Sequence[tuple[str, int]]) -> Chart:
    rest = [f"and {len(rows) - MOST_BARS} more"] if len(rows) > MOST_BARS else []
    return chart(title, bar_chart(rows[:MOST_BARS]), *rest)


def _pictures(examination: Examination) -> Iterator[Photo]:
    """The images with the most findings first, then those with the most objects."""
    counts: Counter[tuple[str, int]] = Counter()
    problems: dict[tuple[str, int], list[str]] = {}
    for finding in examination.findings:
        for image_id, count in Counter(finding.images).items():
            key = (finding.file, image_id)
            counts[key] += count
            problems.setdefault(key, []).append(f"{KINDS[finding.kind].title} ({count})")
    images = [
        (split, scan, (examination.splits[split].name, scan.entry["id"]))
        for split, scans in examination.scans.items()
        for scan in scans
    ]
    images.sort(key=lambda image: (-counts[image[2]], -len(image[1].targets)))
    for split, scan, key in images[:MOST_PICTURES]:
        yield _picture(split, scan, problems.get(key, []))


def _picture(split: str, scan: Scan, problems: Sequence[str]) -> Photo:
    name, size = scan.entry["file_name"], f"{scan.entry['width']}x{scan.entry['height']}"
    count = f"{len(scan.objects)} annotation{'s' * (len(scan.objects) != 1)}"
    caption = (f"{split}, image {scan.entry['id']}: {name}", f"{size}, {count}", *problems)
    return photo(
        draw_objects(scan.source, scan.objects, 480, (scan.entry["height"], scan.entry["width"]), scan.split.reading),
        name,
        caption,
    )
