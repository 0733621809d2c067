"""The doctor's page: one HTML file that needs nothing else; findings, histograms and pictures, worst cases first."""

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from m2f_trainer.data.problems import KINDS, Finding, listed
from m2f_trainer.doctor.examine import Examination
from m2f_trainer.doctor.pictures import draw_objects
from m2f_trainer.doctor.scan import Scan
from m2f_trainer.doctor.summary import (
    class_counts,
    figures,
    image_sizes,
    instances_per_image,
    object_sides,
    relative_file,
    verdict,
)
from m2f_trainer.viz.charts import bars
from m2f_trainer.viz.html import chart, page, photograph, table

_PICTURES = 24
_BARS = 40


def render(examination: Examination) -> str:
    """The page as text."""
    name = html.escape(Path(examination.dataset).resolve().name)
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="verdict">{html.escape(verdict(examination))}</p>',
        *_summary(examination),
        "<h2>Findings</h2>",
        *(_finding(finding, examination) for finding in examination.findings),
        *(["<p>None.</p>"] if not examination.findings else []),
        *_histograms(examination),
        *_pictures(examination),
    ]
    return page(f"m2f check: {Path(examination.dataset).resolve().name}", parts)


def _summary(examination: Examination) -> Iterator[str]:
    told = figures(examination)
    columns = ("images", "empty", "instances", "crowds")
    head = ("split", "images", "empty", "objects", "crowds")
    yield table(head, [[split, *(row[key] for key in columns)] for split, row in told["splits"].items()])


def _finding(finding: Finding, examination: Examination) -> str:
    kind, file = KINDS[finding.kind], html.escape(relative_file(finding, examination))
    ids = f": {html.escape(listed(finding.ids))}" if finding.ids else ""
    fix = f" <code>--fix</code>: {kind.fix}." if kind.fix else ""
    return (
        f'<article class="{finding.severity}"><p><b>{finding.severity}</b> {html.escape(kind.title)} '
        f"<b>&times; {finding.count}</b></p><p>{html.escape(finding.message)}</p>"
        f"<p>{html.escape(kind.why)} {html.escape(kind.remedy)}{fix}</p><small>{file}{ids}</small></article>"
    )


def _histograms(examination: Examination) -> Iterator[str]:
    per_image, sides = instances_per_image(examination), object_sides(examination)
    size = f"{examination.settings.image_width}x{examination.settings.image_height}"
    yield "<h2>Histograms</h2>"
    yield '<div class="grid">'
    if per_image:
        queries = examination.settings.num_queries
        yield _chart(f"Objects in an image (the model has {queries} queries)", _binned(per_image, whole=True))
    if sides:
        yield _chart(f"Object side in pixels at {size} (a mask value covers 4)", _binned(sides, whole=False))
    totals = {name: sum(counts.values()) for name, counts in class_counts(examination).items()}
    yield _chart("Objects of a class", sorted(totals.items(), key=lambda item: -item[1]))
    yield _chart("Image sizes", image_sizes(examination))
    yield "</div>"


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


def _chart(title: str, rows: Sequence[tuple[str, int]]) -> str:
    return chart(title, bars(rows[:_BARS]), f"and {len(rows) - _BARS} more" if len(rows) > _BARS else "")


def _pictures(examination: Examination) -> Iterator[str]:
    """Images with the most findings first, then the most crowded."""
    blamed: Counter[tuple[str, int]] = Counter()
    told: dict[tuple[str, int], list[str]] = {}
    for finding in examination.findings:
        for image_id, count in Counter(finding.images).items():
            key = (finding.file, image_id)
            blamed[key] += count
            told.setdefault(key, []).append(f"{KINDS[finding.kind].title} ({count})")
    images = [(split, scan) for split, scans in examination.scans.items() for scan in scans]
    keys = {id(scan): (examination.splits[split].name, scan.entry["id"]) for split, scan in images}
    images.sort(key=lambda item: (-blamed[keys[id(item[1])]], -len(item[1].targets)))
    yield "<h2>Pictures, worst cases first</h2>"
    yield '<div class="grid">'
    for split, scan in images[:_PICTURES]:
        yield _picture(split, scan, told.get(keys[id(scan)], []))
    yield "</div>"


def _picture(split: str, scan: Scan, problems: Sequence[str]) -> str:
    name, size = scan.entry["file_name"], f"{scan.entry['width']}x{scan.entry['height']}"
    count = f"{len(scan.objects)} annotation{'s' * (len(scan.objects) != 1)}"
    caption = (f"{split}, image {scan.entry['id']}: {name}", f"{size}, {count}", *problems)
    return photograph(draw_objects(scan.source, scan.objects, 480), name, caption)
