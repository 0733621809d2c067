"""The size of a model's input, its tiles and queries; and the objects of a dataset that are too small or too many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m2f_trainer.data.geometry import resize_to_fit
from m2f_trainer.data.problems import Report
from m2f_trainer.doctor.recommend import as_recipe, facts_of, images_of_scans, recommend, this_machine
from m2f_trainer.doctor.scan import Scan, Settings
from m2f_trainer.masks.rle import Size

MASK_STRIDE = 4
"""Input pixels per cell of the mask logits."""


@dataclass(frozen=True)
class ModelInput:
    """The geometry of a model.

    Attributes:
        height, width: what an image or tile is resized to, in pixels.
        tile_size: side of the square tiles in original pixels; None for whole images.
        num_queries: the most objects that are found in an image or tile; None for as many as the data need.
    """

    height: int
    width: int
    tile_size: int | None = None
    num_queries: int | None = None

    def scales(self, original: Size) -> tuple[float, float]:
        """Input pixels per pixel of an image of this (height, width), down and across."""
        seen = (self.tile_size, self.tile_size) if self.tile_size else original
        resized = resize_to_fit(seen, (self.height, self.width)).resized
        return resized[0] / seen[0], resized[1] / seen[1]

    def __str__(self) -> str:
        tiles = f" (tiles of {self.tile_size}x{self.tile_size})" if self.tile_size else ""
        return f"{self.width}x{self.height}{tiles}"


def given_fields(settings: Settings) -> dict[str, int | None]:
    """The recipe fields that are given: one side stands for both, and sides without `tile_size` mean whole images."""
    sides = [side for side in (settings.image_height, settings.image_width) if side is not None]
    fields: dict[str, int | None] = {"tile_size": settings.tile_size} if sides or settings.tile_size else {}
    if sides:
        fields |= {"image_height": sides[0], "image_width": sides[-1]}
    return fields | ({"num_queries": settings.num_queries} if settings.num_queries else {})


def model_input(settings: Settings, scans: Mapping[str, Sequence[Scan]]) -> ModelInput:
    """The given sizes, or what `m2f train` without a recipe chooses for the training images on this machine."""
    chosen: dict[str, Any] = {**given_fields(settings)}
    if "image_height" not in chosen:
        images = scans.get("train") or [scan for found in scans.values() for scan in found]
        chosen |= as_recipe(recommend(facts_of(images_of_scans(images)), this_machine(), chosen))
    return ModelInput(chosen["image_height"], chosen["image_width"], chosen.get("tile_size"), settings.num_queries)


def report_misfits(scans: Mapping[str, Sequence[Scan]], seen: ModelInput, report: Report) -> None:
    """Report objects smaller than a cell of the mask logits, and images with more objects than the given queries.

    With tiles the objects are not counted: a tile holds fewer of them than its image.
    """
    for found in scans.values():
        for scan in found:
            image, split = scan.entry, scan.split
            down, across = seen.scales((image["height"], image["width"]))
            for one in scan.targets:
                width, height = one["mask_box"][2:]
                if one["mask_area"] and min(width * across, height * down) < MASK_STRIDE:
                    sizes = f"{width}x{height} pixels, {width * across:.1f}x{height * down:.1f} at {seen}"
                    message = f"{split.annotation_name(one, image)}: {sizes}."
                    report("tiny-object", split.name, [one["id"]], message, image["id"])
                    one["findings"].append("tiny-object")
            if seen.num_queries is not None and not seen.tile_size and len(scan.targets) > seen.num_queries:
                where = f"image {image['id']} ({image['file_name']})"
                message = f"{where}: {len(scan.targets)} instances, but the model has {seen.num_queries} queries."
                report("many-instances", split.name, [image["id"]], message, image["id"])
