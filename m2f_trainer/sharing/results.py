"""The card's figures: splits, classes, what goes wrong, and pictures of the best and worst images."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from m2f_trainer.data.coco import Category
from m2f_trainer.evaluation.curves import read_details
from m2f_trainer.evaluation.gallery import pictures
from m2f_trainer.sharing.markdown import escape, percent, table

COLUMNS = {
    "map": "mask AP",
    "map_50": "mask AP50",
    "map_75": "mask AP75",
    "map_small": "small",
    "map_medium": "medium",
    "map_large": "large",
    "box_map": "box AP",
    "boundary_map": "boundary AP",
}
SPLITS = {"eval_": "valid", "test_": "test"}
PICTURES = "pictures"
"""The folder of a card's pictures. They show the dataset, so they are uploaded only where that was asked for."""

DRAWN, LONGEST = 3, 480
KINDS = {
    "class": "another class",
    "localisation": "badly outlined",
    "both": "another class and badly outlined",
    "duplicate": "found twice",
    "background": "nothing there",
    "missed": "missed",
}


def results(metrics: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """COCO figures of each split in percent, then each class, then the errors."""
    rows = [
        [split, *(percent(metrics.get(prefix + key, -1)) for key in COLUMNS)]
        for prefix, split in SPLITS.items()
        if f"{prefix}map" in metrics
    ]
    if not rows:
        return []
    told = "COCO AP in percent, at the images' original size, against the untouched annotations:"
    return ["## Results", "", told, "", *table(["split", *COLUMNS.values()], rows), *classes(metrics, details)]


def classes(metrics: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """Mask AP of each class, best first; with the details of the valid split where they are there."""
    shares = {
        split: {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
        for prefix, split in SPLITS.items()
        if (start := f"{prefix}map_class/")
    }
    given = {split: values for split, values in shares.items() if values}
    if not given:
        return []
    rows = {row["name"]: row for row in details.get("classes", [])}
    head = ["class", *(f"mask AP ({split})" for split in given)]
    head += ["objects (valid)", "AP50", "best threshold", "precision there", "recall there"] if rows else []
    names = dict.fromkeys(name for values in given.values() for name in values)
    first = next(reversed(given.values()))
    ranked = sorted(names, key=lambda name: -first.get(name, -1))
    cells = [
        [escape(name), *(percent(values.get(name, -1)) for values in given.values()), *more(rows.get(name), bool(rows))]
        for name in ranked
    ]
    return table(head, cells)


def more(row: Mapping[str, Any] | None, wanted: bool) -> list[str]:
    """What is known of a class beside its AP; a class at whose best threshold nothing is kept has no threshold."""
    if not wanted:
        return []
    if row is None:
        return ["-"] * 5
    kept = [f"{row['threshold']:.2f}", percent(row["precision"]), percent(row["recall"])] if row["kept"] else ["-"] * 3
    return [str(row["objects"]), percent(row["ap50"]), *kept]


def errors(details: Mapping[str, Any]) -> list[str]:
    """What mending each kind of error alone would bring, as TIDE counts it."""
    kinds = details.get("errors", {})
    there = [one for one in KINDS if kinds.get(one, {}).get("count")]
    ranked = sorted(there, key=lambda kind: -kinds[kind]["cost"])
    rows = [[KINDS[one], str(kinds[one]["count"]), f"{100 * kinds[one]['cost']:.1f}"] for one in ranked]
    if not rows:
        return []
    told = "Errors on the valid split at IoU 0.5, and the AP50 in points that mending one kind alone would bring:"
    return [told, "", *table(["error", "how many", "cost"], rows)]


def draw_pictures(folder: Path, dataset: Dataset, details: Mapping[str, Any]) -> list[Path]:
    """Write the worst and the best images with truth beside prediction into the folder's `pictures/`; return them.

    Raises ImageError where an image can't be read.
    """
    categories = [Category(row["id"], row["name"]) for row in details.get("classes", [])]
    written = []
    for kind, entries in details.get("shown", {}).items():
        (folder / PICTURES).mkdir(exist_ok=True)
        for number, (_, image, _) in enumerate(pictures(dataset, entries[:DRAWN], categories, LONGEST), 1):
            written.append(folder / PICTURES / f"{kind}_{number}.jpg")
            image.save(written[-1], "JPEG", quality=85)
    return written


def gallery(folder: Path) -> list[str]:
    """The pictures that `draw_pictures` wrote, with what each shows."""
    shown: Mapping[str, Sequence[Mapping[str, Any]]] = read_details(folder).get("shown", {})
    lines = [
        line for kind, title in (("worst", "Worst"), ("best", "Best")) for line in _row(folder, kind, title, shown)
    ]
    head = ["## Pictures", "", "Images of the valid split: the truth on the left, the prediction on the right.", ""]
    return [*head, *lines] if lines else []


def _row(folder: Path, kind: str, title: str, shown: Mapping[str, Any]) -> Iterator[str]:
    for number, one in enumerate(shown.get(kind, [])[:DRAWN], 1):
        name = f"{PICTURES}/{kind}_{number}.jpg"
        if (folder / name).is_file():
            told = f"{one['found']} found, {one['wrong']} wrong, {one['missed']} missed"
            yield from (f"{title} {number}: {told}", "", f"![{title} {number}: {told}]({name})", "")
