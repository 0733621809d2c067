"""Recipe values that suit a dataset, with the reason for each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2f_trainer.data.geometry import resize_to_fit
from m2f_trainer.doctor.scan import Scan, Settings

SMALL = 32
"""Pixels at the input size: the side of a square of COCO's limit for small objects, about two patches of a backbone."""

OBJECTS_ACROSS = 4
"""Objects (of the third quartile of the longer sides) that fit side by side into a proposed tile."""

TILE_STEP = 16
LARGEST_TILE = 0.6  # of the shorter side of half of the images: larger tiles would be hardly smaller than the images


@dataclass(frozen=True)
class Advice:
    """A value for a recipe field, and why."""

    value: int
    reason: str


def tile_size(scans: Sequence[Scan], settings: Settings) -> Advice | None:
    """A tile size for images whose objects are small at the input size or more than the queries; None for no tiles.

    Objects that are large compared to the images need no tiles, and would be cut by them.
    """
    objects = [(scan, one) for scan in scans for one in scan.targets if one["mask_area"]]
    if not objects:
        return None
    padded = (settings.image_height, settings.image_width)
    scales = {id(scan): resize_to_fit(size, padded).resized[0] / size[0] for scan in scans if (size := _size(scan))}
    side = float(np.median([scales[id(scan)] * one["mask_area"] ** 0.5 for scan, one in objects]))
    most = int(np.quantile([len(scan.targets) for scan in scans], 0.99, method="higher"))
    longest = float(np.quantile([max(one["mask_box"][2:]) for _, one in objects], 0.75))
    tile = TILE_STEP * max(2, round(OBJECTS_ACROSS * longest / TILE_STEP))
    if tile > LARGEST_TILE * float(np.median([min(_size(scan)) for scan in scans])):
        return None
    reasons = []
    if side < SMALL:
        reasons.append(f"half of the objects are smaller than {math.ceil(side)} pixels at {padded[1]}x{padded[0]}")
    if most > settings.num_queries:
        reasons.append(
            f"1 % of the images have {most} objects or more, and the model has {settings.num_queries} queries"
        )
    return Advice(tile, " and ".join(reasons)) if reasons else None


def _size(scan: Scan) -> tuple[int, int]:
    """(height, width) of an image."""
    return scan.entry["height"], scan.entry["width"]
