"""The doctor's page: one HTML file that needs nothing else; findings, histograms and pictures, worst cases first."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from m2f_trainer.data.doctor import Examination
from m2f_trainer.data.findings import KINDS, Finding
from m2f_trainer.data.inspection import Scan
from m2f_trainer.data.pictures import draw_objects
from m2f_trainer.data.summary import (
    class_counts,
    figures,
    image_sizes,
    instances_per_image,
    object_sides,
    relative,
    verdict,
)

_PICTURES = 24
_BARS = 40

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bar: #3b82c4; --error: #c62f2f; --warning: #b87a00 }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.verdict { font-size: 1.1rem; margin: .25rem 0 1rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid var(--line) }
article { border: 1px solid var(--line); border-left: 5px solid var(--warning); border-radius: 4px; margin: .6rem 0;
  padding: .5rem .8rem }
article.error { border-left-color: var(--error) } article p { margin: .2rem 0 } article small { opacity: .75 }
.error b { color: var(--error) } .warning b { color: var(--warning) }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)) }
figure { margin: 0; border: 1px solid var(--line); border-radius: 4px; overflow: hidden }
figure img { display: block; width: 100%; height: auto; background: var(--soft) }
figcaption { padding: .4rem .6rem; font-size: .85rem }
svg { width: 100%; height: auto; display: block } svg text { fill: currentColor; font-size: 11px }
svg rect { fill: var(--bar) }
"""


def render(examination: Examination) -> str:
    """The page as text."""
    name = html.escape(examination.root.resolve().name)
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
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>m2f check: {name}</title>"
    body = "\n".join(parts)
    page = f"<head>{head}{title}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>"
    return f'<!doctype html>\n<html lang="en">{page}</html>\n'


def _summary(examination: Examination) -> Iterator[str]:
    told = figures(examination)
    columns = ("images", "empty", "instances", "crowds")
    head = "".join(f"<th>{text}</th>" for text in ("split", "images", "without objects", "objects", "crowd regions"))
    rows = "".join(
        f"<tr><td>{split}</td>{''.join(f'<td>{row[key]}</td>' for key in columns)}</tr>"
        for split, row in told["splits"].items()
    )
    yield f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _finding(finding: Finding, examination: Examination) -> str:
    kind, file = KINDS[finding.kind], html.escape(relative(finding, examination))
    ids = f": {html.escape(finding.some_ids())}" if finding.ids else ""
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


def _chart(title: str, bars: Sequence[tuple[str, int]]) -> str:
    """Horizontal bars: readable on a phone, whatever the labels."""
    shown, most = bars[:_BARS], max((count for _, count in bars), default=0) or 1
    lines = []
    for row, (label, count) in enumerate(shown):
        y, width = 16 * row, 170 * count / most
        lines.append(
            f'<text x="96" y="{y + 11}" text-anchor="end">{html.escape(label[:16])}</text>'
            f'<rect x="102" y="{y + 2}" width="{width:.1f}" height="11"/>'
            f'<text x="{106 + width:.1f}" y="{y + 11}">{count}</text>'
        )
    more = f"<figcaption>and {len(bars) - len(shown)} more</figcaption>" if len(bars) > len(shown) else ""
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 320 {16 * max(1, len(shown))}" role="img">{"".join(lines)}</svg>{more}</figure>'
    )


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
    keys = {id(scan): (str(examination.files[split].path), scan.entry["id"]) for split, scan in images}
    images.sort(key=lambda item: (-blamed[keys[id(item[1])]], -len(item[1].targets)))
    yield "<h2>Pictures, worst cases first</h2>"
    yield '<div class="grid">'
    for split, scan in images[:_PICTURES]:
        yield _picture(split, scan, told.get(keys[id(scan)], []))
    yield "</div>"


def _picture(split: str, scan: Scan, problems: Sequence[str]) -> str:
    buffer = io.BytesIO()
    draw_objects(scan.source, scan.objects, 480).save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    name, size = html.escape(scan.entry["file_name"]), f"{scan.entry['width']}x{scan.entry['height']}"
    blame = "".join(f"<br>{html.escape(problem)}" for problem in problems)
    return (
        f'<figure><img alt="{name}" src="data:image/jpeg;base64,{data}"><figcaption>{split}, image'
        f" {scan.entry['id']}: {name}<br>{size}, {len(scan.objects)} annotations{blame}</figcaption></figure>"
    )
