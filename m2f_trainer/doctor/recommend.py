"""A recipe for a dataset and a machine, with a reason for each choice.

`m2f check --recipe FILE` writes it, and `m2f train --dataset_name X` without a recipe trains it. The thresholds follow
the measurements in benchmarks/accuracy/TABLES.md.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import get_token

from m2f_trainer.config.arguments import ModelArguments
from m2f_trainer.config.bfloat16 import cpu_is_faster_in_bf16
from m2f_trainer.config.recipe import backbone_layers, backbone_stride
from m2f_trainer.doctor.scan import Scan
from m2f_trainer.masks.rle import Size, areas
from m2f_trainer.model.backbones import BACKBONES

Image = tuple[Size, list[tuple[int, float]]]
"""(height, width) of an image, and the category id and area of each instance, in pixels of the original image."""

DEFAULT_BACKBONE = "dinov3-vits16plus"
"""The backbone on a machine with a GPU."""

TILE_IN_OBJECTS, CPU_SCALE = 4.7, 1.4
"""Side of a tile in median object sides, and its enlargement to the model's input on a CPU.

Nuclei of 17 pixels after 300 steps of 8 tiles: AP 38.7 for tiles of 112 pixels, 42.3 for 80 and 40.7 for 64, each
resized to 112 pixels.
"""

EVAL_TILE_IN_OBJECTS = 3.8
"""Side of a tile in evaluation on a CPU, in median object sides.

Nuclei of 17 pixels, two models trained on tiles of 80 pixels: AP 54.1 both with tiles of 80 pixels, 55.1 both with 64.
Trained on tiles of 64 pixels, which hold fewer objects, a model had AP 46.7 after 400 steps, compared with 47.3.
"""

WORTH_TILES = 0.75
"""Images are cut into tiles when a tile's side is below this share of the images' longer side."""

FEW_IMAGES = 2_000
"""Below this many training images LoRA is as good as tuning the whole backbone, at a lower cost."""

CPU_SIDE, GPU_SIDE = 336, 1024
"""Largest side of the model's input for images that are not cut into tiles."""

SMALL_INPUT = 168**2
"""Inputs of at most this many pixels are trained in larger batches on a CPU."""

CPU_MINUTES = 60
LORA_MINUTES = 4
"""CPU runs on tiles of at least this length train LoRA adapters; it is the shortest run in which they were measured."""

CPU_SECONDS_PER_PIXEL = 2.6e-6
"""CPU time of one training sample with the light head and a frozen DINOv2 ViT-S, for each pixel of the input.

Measured with 336 x 336 pixels and kept features: 2.3e-6. Computing the features takes 1.2e-6 more (0.14 s an image).
"""

FEWEST_VIEWS, MOST_VIEWS = 2, 6
USES_OF_VIEW = 3
"""Backbone features are kept in as many views as a run shows this often, at least `FEWEST_VIEWS`; otherwise not at all.

A view takes 0.12 CPU s to compute and saves 0.14 each time (336 x 336 pixels).
"""

MANY_PASSES = 15
MILD_JITTER = (0.8, 1.3)
"""Scale jitter of whole images that a run shows at least `MANY_PASSES` times.

407 photos in an hour: AP 22.3 with it and six views (2,136 steps), 21.3 without and two views (1,930 steps).
"""

PASTED = 0.5
"""Share of the tiles onto which objects of another image are pasted.

Nuclei after 10 CPU minutes, three seeds: AP 52.6, 52.6, 52.6 with it, 52.3, 52.1, 52.1 without.
"""


@dataclass(frozen=True)
class Facts:
    """Figures of a training split on which the choices depend. Crowd regions are not counted.

    images       number of images
    most         the most instances in one image
    object_side  median over instances of the square root of their area, in pixels of the original image
    large_side   the same for the class whose objects are largest
    image_side   median over images of the longer side, in pixels of the original image
    pixels       total number of pixels of the images
    """

    images: int
    most: int
    object_side: float
    large_side: float
    image_side: float
    pixels: int


@dataclass(frozen=True)
class Machine:
    """The properties of a machine on which the choices depend.

    accelerator  torch has a device other than the CPU
    token        a Hub token is set, so gated weights can be loaded
    bf16         the CPU computes faster in bfloat16 than in float32
    """

    accelerator: bool
    token: bool
    bf16: bool = False


@dataclass(frozen=True)
class Choice:
    """The value of one recipe field, and the reason for it."""

    field: str
    value: Any
    reason: str


def this_machine() -> Machine:
    """The machine of this process."""
    return Machine(torch.accelerator.is_available(), get_token() is not None, cpu_is_faster_in_bf16())


def images_of_rows(rows: Dataset) -> Iterator[Image]:
    """The images of a split (rows of `m2f_trainer.data.dataset`); none is opened.

    Areas are those of the masks: exporters write other ones, such as 0.
    """
    for row in rows.select_columns(["height", "width", "objects"]):
        size, targets = (row["height"], row["width"]), [one for one in row["objects"] if not one["iscrowd"]]
        found = areas([{"size": size, "counts": one["counts"]} for one in targets])
        yield size, [(one["category_id"], area) for one, area in zip(targets, found, strict=True)]


def images_of_scans(scans: Iterable[Scan]) -> Iterator[Image]:
    """The images that `m2f check` has examined."""
    for scan in scans:
        size = (scan.entry["height"], scan.entry["width"])
        yield size, [(one["category_id"], one["mask_area"]) for one in scan.targets]


def facts_of(images: Iterable[Image]) -> Facts:
    """Count and measure the objects of a training split."""
    counts, longer, pixels = [], [], 0
    sides: dict[int, list[float]] = {}
    for size, objects in images:
        counts.append(len(objects))
        longer.append(max(size))
        pixels += size[0] * size[1]
        for category_id, area in objects:
            sides.setdefault(category_id, []).append(math.sqrt(area))
    image_side = float(np.median(longer)) if longer else 0.0
    every = [side for some in sides.values() for side in some]
    return Facts(
        images=len(counts),
        most=max(counts, default=0),
        object_side=float(np.median(every)) if every else image_side,
        large_side=max((float(np.median(some)) for some in sides.values()), default=image_side),
        image_side=image_side,
        pixels=pixels,
    )


def recommend(facts: Facts, machine: Machine, given: Mapping[str, Any] | None = None) -> list[Choice]:
    """Choose recipe fields for a dataset and a machine. Fields that are not listed keep their defaults.

    `given`: fields that the user has set. They are kept, and nothing is chosen that contradicts them. A `tile_size` of
    None means whole images.

    Raises RecipeError or ModelError where the given backbone can't be read.
    """
    given = given or {}
    backbone = _backbone(machine)
    kept = {name for set_field, names in EXCLUDES.items() if given.get(set_field) is not None for name in names}
    named = {name: given[name] for name in ("backbone", "backbone_config") if name in given}
    model = ModelArguments(**({} if "backbone" in kept else {"backbone": backbone.value}) | named)
    view = _input(facts, machine, backbone_stride(model), given)
    cut = [] if machine.accelerator else _taps(model, as_recipe(view))
    choices = [backbone, *cut, *view, *_training(facts, machine, as_recipe(view) | dict(given))]
    if given.get("tune", "frozen") != "frozen":
        kept.add("feature_cache")
    return [choice for choice in choices if choice.field not in kept | given.keys()]


def given_choices(given: Mapping[str, Any], machine: Machine) -> list[Choice]:
    """The fields that the user has set, except None; sides are rounded to a multiple of the backbone's patch size."""
    patch = backbone_stride(ModelArguments(backbone=_backbone(machine).value))
    choices = []
    for name, value in given.items():
        if name in ("image_height", "image_width") and value % patch:
            rounded = max(patch, round(value / patch) * patch)
            choices.append(Choice(name, rounded, f"given: {value}; the backbone needs a multiple of {patch}"))
        elif value is not None:
            choices.append(Choice(name, value, "given"))
    return choices


EXCLUDES = {
    "backbone_config": ("backbone",),
    "init_from": ("backbone", "pyramid_taps", "head"),
    "head_checkpoint": ("head",),
    "augmentation": ("lsj_min_scale", "lsj_max_scale", "copy_paste"),
    "fp16": ("bf16",),
    "max_steps": ("max_minutes", "num_train_epochs"),
    "max_minutes": ("num_train_epochs",),
    "num_train_epochs": ("max_minutes",),
}
"""A field that the user has set -> the fields for which nothing is chosen then."""


def as_recipe(choices: Sequence[Choice]) -> dict[str, Any]:
    """The fields and values of a recipe file."""
    return {choice.field: choice.value for choice in choices}


def choices_text(choices: Sequence[Choice]) -> str:
    """One line for each choice: field, value, reason."""
    widths = [
        max(len(cell) for cell in column) for column in zip(*((c.field, str(c.value)) for c in choices), strict=True)
    ]
    return "\n".join(f"  {c.field:{widths[0]}}  {c.value!s:{widths[1]}}  {c.reason}" for c in choices)


def _backbone(machine: Machine) -> Choice:
    if not machine.accelerator:
        return Choice("backbone", "dinov2-small", "no GPU: the smallest backbone")
    if not machine.token:
        reason = (
            f"no Hub token: the weights of {DEFAULT_BACKBONE} in a repository without access requests (DINOv3 licence)"
        )
        return Choice("backbone", BACKBONES[DEFAULT_BACKBONE].ungated, reason)
    return Choice("backbone", DEFAULT_BACKBONE, "the default, since there are a GPU and a Hub token")


def _taps(model: ModelArguments, view: Mapping[str, Any]) -> list[Choice]:
    """Read only the first half of a ViT where images are cut into tiles.

    Nuclei after 5 CPU-minutes: AP 45.2 with layers 2, 4 and 6 of 12, 43.8 with the first four.
    """
    layers = backbone_layers(model)
    if "tile_size" not in view or layers < 6:
        return []
    taps = [round(layers * k / 6) for k in (1, 2, 3)]
    return [Choice("pyramid_taps", taps, f"small objects need no deep features: half of {layers} layers is enough")]


def _input(facts: Facts, machine: Machine, stride: int, given: Mapping[str, Any]) -> list[Choice]:
    """Tiles or whole images, the size of the model's input, and the queries."""
    tile_size, whole = given.get("tile_size"), "tile_size" in given and not given["tile_size"]
    tile = tile_size or max(4, round(TILE_IN_OBJECTS * facts.object_side / 8)) * 8
    found = f"objects of {facts.object_side:.0f} pixels, images of {facts.image_side:.0f}"
    choices = []
    if tile_size or (not whole and tile < WORTH_TILES * facts.image_side and facts.large_side < tile / 2):
        side = _multiple(min(4 * tile, GPU_SIDE / 2) if machine.accelerator else CPU_SCALE * tile, stride)
        choices.append(Choice("tile_size", tile, f"{found}: train on tiles of each image"))
        reason = "tiles are enlarged, for finer outlines"
        smaller = max(4, round(EVAL_TILE_IN_OBJECTS * facts.object_side / 8)) * 8
        if not machine.accelerator and not tile_size and smaller < tile:
            choices.append(Choice("eval_tile_size", smaller, "smaller tiles in evaluation find more small objects"))
    else:
        side = _multiple(min(facts.image_side, GPU_SIDE if machine.accelerator else CPU_SIDE), stride)
        reason = f"{found}: train on whole images"
    sizes = [Choice(name, side, reason) for name in ("image_height", "image_width")]
    return [*choices, *sizes, Choice("num_queries", "auto", f"at most {facts.most} objects in an image")]


def _training(facts: Facts, machine: Machine, chosen: Mapping[str, Any]) -> list[Choice]:
    """Tuning, head, augmentation and length; `chosen` are the fields that are known already."""
    if machine.accelerator:
        return [
            Choice("tune", "lora" if facts.images < FEW_IMAGES else "full", f"{facts.images:,} training images"),
            Choice("num_train_epochs", "auto", "depends on the number of images"),
            Choice("per_device_train_batch_size", "auto", "up to 16 images per step: small batches leave a GPU idle"),
            Choice("learning_rate", "auto", "depends on the images of an optimizer step"),
            *_evaluation(chosen, 32),
            *_copy_paste(chosen),
        ]
    return [
        *_cpu_tuning(facts, chosen),
        *([Choice("bf16", True, "this CPU computes faster in bfloat16")] if machine.bf16 else []),
        Choice("head", "light", "no GPU: a tenth of the original head's cost"),
        *_jitter(facts, chosen),
        *_copy_paste(chosen),
        *_batch(chosen),
        *(_evaluation(chosen, 16) if _is_small(chosen) else []),
        Choice("max_grad_norm", 1.0, "measured with the light head"),
        Choice("max_minutes", CPU_MINUTES, "no GPU: an hour; change it with --max_minutes"),
    ]


def _batch(chosen: Mapping[str, Any]) -> list[Choice]:
    """Images of a step on a CPU, and the learning rate for them; both were measured with the light head.

    Facades after 20 CPU minutes, 4 images a step: AP 17.5 at a rate of 5e-4, 18.9 at 1e-3 (17.8 over three later
    seeds), 17.3 at 2e-3; after an hour 22.3 and 22.4.
    """
    batch, rate = (8, 7e-4) if _is_small(chosen) else (4, 1e-3)
    reason = f"measured with the light head and {batch} images per step"
    return [Choice("per_device_train_batch_size", batch, reason), Choice("learning_rate", rate, reason)]


def _is_small(chosen: Mapping[str, Any]) -> bool:
    """Whether the model's input has so few pixels that a CPU computes it in larger batches."""
    return bool(chosen["image_height"] * chosen["image_width"] <= SMALL_INPUT)


def _evaluation(chosen: Mapping[str, Any], batch: int) -> list[Choice]:
    """Tiles of a forward pass in evaluation: on a CPU, 16 of 112 x 112 take 12 % less CPU time than 4 at a time."""
    return [Choice("per_device_eval_batch_size", batch, "tiles are small")] if chosen.get("tile_size") else []


def _cpu_tuning(facts: Facts, chosen: Mapping[str, Any]) -> list[Choice]:
    """LoRA where small inputs make it cheap and the run is long enough; otherwise a frozen backbone.

    Nuclei in tiles, LoRA and frozen: AP 47.3 after 4.1 CPU minutes and 46.3 after 5; 50.7 and 49.7 after 10.
    """
    if chosen.get("tile_size") and (chosen.get("max_minutes") or CPU_MINUTES) >= LORA_MINUTES:
        return [Choice("tune", "lora", f"tiles are cheap: LoRA pays in runs of {LORA_MINUTES} minutes or more")]
    return [Choice("tune", "frozen", "no GPU: only neck and head are trained"), *_feature_cache(facts, chosen)]


def _jitter(facts: Facts, chosen: Mapping[str, Any]) -> list[Choice]:
    """The scale jitter: none, unless the run shows whole images so often that it would overfit to them."""
    low, high, reason = 1.0, 1.0, "runs of minutes learn faster without scale jitter"
    if _shown_often(facts, chosen):
        (low, high), reason = (
            MILD_JITTER,
            f"against overfitting: each image is shown {_passes(facts, chosen):.0f} times",
        )
    return [Choice("lsj_min_scale", low, reason), Choice("lsj_max_scale", high, reason)]


def _copy_paste(chosen: Mapping[str, Any]) -> list[Choice]:
    """Copy-paste on tiles; on whole images it was not measured."""
    reason = f"objects of another image are pasted onto {PASTED:.0%} of the tiles"
    return [Choice("copy_paste", PASTED, reason)] if chosen.get("tile_size") else []


def _feature_cache(facts: Facts, chosen: Mapping[str, Any]) -> list[Choice]:
    """Keep the frozen backbone's features where a run is long enough to use each of them several times.

    More than two views differ only by jitter, so they are kept only with that of `_jitter`.
    """
    passes = _passes(facts, chosen)
    jitter = _shown_often(facts, chosen) and not chosen.keys() & {"augmentation", "lsj_min_scale", "lsj_max_scale"}
    views = min(int(passes / USES_OF_VIEW), MOST_VIEWS if jitter else FEWEST_VIEWS)
    if views < FEWEST_VIEWS:
        return []
    reason = f"features of {views} views are kept on disk and used about {passes / views:.0f} times each"
    return [Choice("feature_cache", views, reason)]


def _shown_often(facts: Facts, chosen: Mapping[str, Any]) -> bool:
    """Whether the run trains on whole images and shows each at least `MANY_PASSES` times."""
    return not chosen.get("tile_size") and _passes(facts, chosen) >= MANY_PASSES


def _passes(facts: Facts, chosen: Mapping[str, Any]) -> float:
    """How often a run on a CPU shows each image, or each tile."""
    tile = chosen.get("tile_size")
    samples = max(facts.pixels / tile**2 if tile else facts.images, 1)
    return _samples_shown(samples, chosen) / samples


def _samples_shown(samples: float, chosen: Mapping[str, Any]) -> float:
    """How many samples a run on a CPU trains on, by the length that the user has set; `samples`: of an epoch."""
    if chosen.get("max_steps", -1) > 0:
        given = chosen.get("per_device_train_batch_size")
        batch: int = given if isinstance(given, int) else as_recipe(_batch(chosen))["per_device_train_batch_size"]
        return float(chosen["max_steps"]) * batch
    if isinstance(chosen.get("num_train_epochs"), (int, float)):
        return float(chosen["num_train_epochs"]) * samples
    minutes: float = chosen.get("max_minutes") or CPU_MINUTES
    pixels: int = chosen["image_height"] * chosen["image_width"]
    return 60 * minutes / (CPU_SECONDS_PER_PIXEL * pixels)


def _multiple(side: float, stride: int) -> int:
    """The multiple of the backbone's stride nearest to a side, at least four times the stride."""
    return max(4, round(side / stride)) * stride
