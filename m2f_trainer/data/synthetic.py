"""A synthetic, seeded COCO dataset: circles, squares and triangles of different colours on textured backgrounds.

A model learns it in minutes on a CPU. Like real datasets it contains overlaps, objects in two parts, polygons and both
kinds of RLE, crowd regions, images without objects, sparse category ids and an unused super-category.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from m2f_trainer.masks import rle
from m2f_trainer.masks import segmentation as masks

Points: TypeAlias = npt.NDArray[np.float64]  # (P, 2), x and y

SHAPES: Mapping[str, tuple[int, int, tuple[int, int, int]]] = {  # name: category id, corners, colour
    "circle": (1, 32, (205, 60, 50)),
    "square": (3, 4, (60, 170, 75)),
    "triangle": (7, 3, (60, 95, 210)),
}
_CATEGORIES = [
    {"id": 0, "name": "shapes", "supercategory": "none"},
    *({"id": key, "name": name, "supercategory": "shapes"} for name, (key, _, _) in SHAPES.items()),
]
_SIDES = ((128, 128), (128, 128), (112, 144), (144, 112), (96, 128), (128, 96))  # height, width
_GREY = (110, 105, 100)


def write_sample(root: str | Path, *, seed: int = 0, images: tuple[int, int, int] = (240, 40, 20)) -> Path:
    """Write train, valid and test with this many `images`, in the Roboflow layout; return `root`."""
    folder = Path(root)
    for k, (split, count) in enumerate(zip(("train", "valid", "test"), images, strict=True)):
        if count:
            _write_images(folder / split, count, np.random.default_rng(np.random.SeedSequence([seed, k])))
    return folder


def _write_images(folder: Path, count: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "info": {"description": "Synthetic shapes, made by m2f_trainer", "version": "1"},
        "licenses": [],
        "categories": _CATEGORIES,
        "images": [],
        "annotations": [],
    }
    for number in range(1, count + 1):
        drawing = Drawing(_SIDES[int(rng.integers(len(_SIDES)))], rng)
        drawing.fill(number)
        name = f"shapes_{number:04d}.jpg"
        drawing.image.save(folder / name, quality=92)
        entry = {"id": number, "file_name": name, "height": drawing.height, "width": drawing.width}
        content["images"].append(entry)
        for annotation in drawing.annotations:
            content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": number, **annotation})
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


class Drawing:
    """One image being drawn, and its annotations."""

    def __init__(self, size: rle.Size, rng: np.random.Generator) -> None:
        self.height, self.width = size
        self.rng = rng
        self.image = _background(size, rng)
        self.annotations: list[dict[str, Any]] = []
        self._boxes: list[rle.Box] = []

    def fill(self, number: int) -> None:
        """Draw 2 to 5 objects; every twelfth image stays empty, every tenth gets a crowd region too."""
        if number % 12 == 5:
            return
        if number % 10 == 3:
            self._add_crowd()
        for _ in range(int(self.rng.integers(2, 6))):
            self._add_object()

    def _add_object(self) -> None:
        name = list(SHAPES)[int(self.rng.integers(len(SHAPES)))]
        for _ in range(20):  # tries to find a place with little overlap
            points = self._place(name)
            box = _box_of(points)
            if max((_covered(box, other) for other in self._boxes), default=0.0) < 0.15:
                break
        else:
            return
        self._boxes.append(box)
        self._paint(points, _tint(SHAPES[name][2], self.rng))
        parts = self._split(points) if self.rng.random() < 0.12 else [points]
        self._annotate(SHAPES[name][0], parts)

    def _place(self, name: str) -> Points:
        """The corners of a shape of 20 to 50 pixels, slightly rotated, at a random place inside the image."""
        corners = SHAPES[name][1]
        radius = self.rng.uniform(11, 26) * (1.15 if corners == 3 else 1.0)
        turn = self.rng.uniform(-0.25, 0.25) + (np.pi / 4 if corners == 4 else -np.pi / 2)
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        points: Points = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        low, high = points.min(axis=0), points.max(axis=0)
        corner: Points = self.rng.uniform(1 - low, np.array([self.width, self.height]) - 1 - high)
        return points + corner

    def _split(self, points: Points) -> list[Points]:
        """The two parts of an object that is covered in the middle by a vertical bar, which is drawn."""
        middle = float(points[:, 0].mean())
        left, right = _clip(points, middle - 2, keep_left=True), _clip(points, middle + 2, keep_left=False)
        x0, y0, x1, y1 = middle - 2, points[:, 1].min() - 4, middle + 2, points[:, 1].max() + 4
        self._paint(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), _GREY)
        return [left, right]

    def _annotate(self, category_id: int, parts: list[Points]) -> None:
        polygons = [np.round(part, 2).reshape(-1).tolist() for part in parts]
        counts = masks.to_counts(polygons, self.height, self.width, "sample")
        runs = rle.read_runs(counts, self.height, self.width)
        forms: list[object] = [polygons] * 5
        forms += [{"size": [self.height, self.width], "counts": form} for form in (counts, runs.tolist())]
        form = forms[0] if len(parts) > 1 else forms[int(self.rng.integers(len(forms)))]
        self.annotations.append(_annotation(category_id, form, runs, self.height))

    def _add_crowd(self) -> None:
        """Draw a group of small circles, annotated as one crowd region."""
        centre = self.rng.uniform(25, [self.width - 25, self.height - 25])
        bitmap = np.zeros((self.height, self.width), dtype=np.uint8)
        angles = 2 * np.pi * np.arange(12) / 12
        for offset in self.rng.uniform(-18, 18, size=(14, 2)):
            points = centre + offset + 5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            self._paint(points, _tint(SHAPES["circle"][2], self.rng))
            polygon = [points.reshape(-1).tolist()]
            bitmap |= masks.decode(masks.to_counts(polygon, self.height, self.width, "sample"), self.height, self.width)
        runs = rle.read_runs(masks.encode(bitmap), self.height, self.width)
        self._boxes.append(rle.box_of(runs, self.height))
        form = {"size": [self.height, self.width], "counts": runs.tolist()}
        self.annotations.append({**_annotation(SHAPES["circle"][0], form, runs, self.height), "iscrowd": 1})

    def _paint(self, points: Points, color: tuple[int, int, int]) -> None:
        """Draw a polygon, antialiased: at four times the size, then reduced."""
        stencil = Image.new("L", (4 * self.width, 4 * self.height))
        ImageDraw.Draw(stencil).polygon([tuple(point) for point in (4 * points).tolist()], fill=255)
        self.image.paste(color, mask=stencil.resize(self.image.size, Image.Resampling.BOX))


def _annotation(category_id: int, segmentation: object, runs: rle.Runs, height: int) -> dict[str, Any]:
    x0, y0, x1, y1 = rle.box_of(runs, height)
    return {
        "category_id": category_id,
        "segmentation": segmentation,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": rle.area(runs),
        "iscrowd": 0,
    }


def _background(size: rle.Size, rng: np.random.Generator) -> Image.Image:
    """A background of coarse patches of two muted colours with fine noise."""
    height, width = size
    first, second = rng.uniform(90, 190, size=(2, 1)) + rng.uniform(-18, 18, size=(2, 3))
    coarse = Image.fromarray(rng.integers(0, 256, size=(6, 8), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    share = np.asarray(coarse)[..., None] / 255.0  # (H, W, 1)
    noise = rng.normal(0, 9, size=(height, width, 1))
    return Image.fromarray((first * share + second * (1 - share) + noise).clip(0, 255).astype(np.uint8))


def _tint(color: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (np.array(color) + rng.integers(-30, 31, size=3)).clip(0, 255).tolist()
    return red, green, blue


def _box_of(points: Points) -> rle.Box:
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return int(x0), int(y0), int(x1) + 1, int(y1) + 1


def _covered(a: rle.Box, b: rle.Box) -> float:
    """The fraction of the smaller box that the other covers."""
    return rle.box_area(rle.intersection(a, b)) / min(rle.box_area(a), rle.box_area(b))


def _clip(points: Points, x: float, *, keep_left: bool) -> Points:
    """The part of a polygon on one side of a vertical line (Sutherland and Hodgman)."""
    inside = points[:, 0] <= x if keep_left else points[:, 0] >= x
    kept: list[Points] = []
    for i in range(len(points)):
        before, here = points[i - 1], points[i]
        if inside[i - 1] != inside[i]:
            kept.append(before + (here - before) * (x - before[0]) / (here[0] - before[0]))
        if inside[i]:
            kept.append(here)
    return np.array(kept)
