"""Compare an exported file with the model it was made from, on images: logits, masks, AP and time."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from m2f_trainer.config.arguments import pixel_range_text
from m2f_trainer.data.dataset import Category, load_coco
from m2f_trainer.data.hub_dataset import load_recipe_dataset
from m2f_trainer.data.reading import model_range
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.transforms import read_image
from m2f_trainer.data.validate import check_split, match_rows
from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.export.export import CONSTANTS, FILES, INPUTS, frame_stride
from m2f_trainer.export.openvino import CompiledFile
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.model.mask2former import M2FConfig, M2FModel
from m2f_trainer.run_folder import RECIPE, read_json, write_json

REPORT = "parity.json"
COMPARED = 0.05
"""Masks of instances that score above this are compared."""


@dataclass(frozen=True)
class ParityLimits:
    """Limits of parity: the mask APs differ by less than `ap`, and the mean IoU of the masks is above `iou`.

    In a frame of another size, where two images of noise are compared, mask logits differ by at most the fraction
    `other_size` of the largest.
    """

    ap: float
    iou: float
    other_size: float = 0.05


FULL, HALF, INT8 = ParityLimits(0.001, 0.99), ParityLimits(0.01, 0.95), ParityLimits(0.01, 0.9, 0.5)


@dataclass(frozen=True)
class Parity:
    """The measured differences; `model_*` is the model in torch, `file_*` the exported file."""

    images: int
    class_logits: float  # largest difference
    mask_logits: float  # largest difference
    mask_logits_size: float  # largest absolute mask logit of the model, for scale
    instances: int  # number of compared masks; without any the IoU is 1
    mask_iou: float  # mean over instances of the IoU with the best match of the same class
    mask_iou_lowest: float
    model_ap: float
    file_ap: float
    model_seconds: float  # median per frame of the network: an image, or a tile of one
    file_seconds: float
    other_size: float | None  # largest difference of mask logits in a frame of another size; None for a fixed size
    limits: ParityLimits

    @property
    def met(self) -> bool:
        """Whether the file can replace the model: all differences are within the limits."""
        other_size = self.other_size is None or self.other_size <= self.limits.other_size * self.mask_logits_size
        return abs(self.file_ap - self.model_ap) < self.limits.ap and self.mask_iou > self.limits.iou and other_size

    def to_text(self) -> str:
        """The report as text for the console."""
        lines = [
            f"parity on {self.images} images",
            f"  class logits   differ by {self.class_logits:.2e} at most",
            f"  mask logits    differ by {self.mask_logits:.2e} at most, of {self.mask_logits_size:.1f}",
            f"  mask IoU       {self.mask_iou:.5f} on average, {self.mask_iou_lowest:.5f} at worst "
            f"(limit {self.limits.iou} on average), of {self.instances} instances scored above {COMPARED}",
            f"  mask AP        model {self.model_ap:.5f}, file {self.file_ap:.5f}: "
            f"{abs(self.file_ap - self.model_ap):.5f} apart (limit {self.limits.ap})",
            f"  per frame      model {1000 * self.model_seconds:.1f} ms, file {1000 * self.file_seconds:.1f} ms "
            "(network only, median wall time on this device)",
        ]
        if self.other_size is not None:
            lines.append(f"  another size   mask logits differ by {self.other_size:.2e} at most")
        if not self.instances:
            lines.append(
                f"  no instance scored above {COMPARED}: only logits were compared; train longer, or try other images"
            )
        return "\n".join([*lines, f"  parity is {'met' if self.met else 'NOT MET'}"])


class Runner(nn.Module):
    """A model for a Predictor that records the logits and the duration of each call."""

    def __init__(self, config: M2FConfig) -> None:
        super().__init__()
        self.config = config
        self.device = torch.device("cpu")
        self.logits: list[tuple[Tensor, Tensor]] = []
        self.seconds: list[float] = []

    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) and (B, H, W) -> class and mask logits."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Mask2FormerForUniversalSegmentationOutput:
        """As `M2FModel.forward`, without a loss."""
        start = time.perf_counter()
        classes, masks = self.run(pixel_values, pixel_mask)
        self.seconds.append(time.perf_counter() - start)
        self.logits.append((classes, masks))
        return Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)


class ModelRunner(Runner):
    """The model itself, on the CPU."""

    def __init__(self, model: M2FModel) -> None:
        super().__init__(model.config)
        self.model = model

    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        assert output.class_queries_logits is not None
        assert output.masks_queries_logits is not None
        return output.class_queries_logits, output.masks_queries_logits


class OnnxRunner(Runner):
    """An ONNX file in onnxruntime, with as many threads as torch uses."""

    def __init__(self, path: Path, config: M2FConfig) -> None:
        import onnxruntime

        super().__init__(config)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        usable = [name for name in onnxruntime.get_available_providers() if name[:4] in ("CUDA", "CPUE")]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=usable)

    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        inputs = dict(zip(INPUTS, (pixel_values.numpy(), pixel_mask.numpy()), strict=True))
        classes, masks = self.session.run(None, inputs)
        return torch.from_numpy(classes), torch.from_numpy(masks)


class OpenVinoRunner(Runner):
    """An OpenVINO file on the CPU, compiled with the options of its model.json."""

    def __init__(self, path: Path, config: M2FConfig) -> None:
        super().__init__(config)
        self.compiled = CompiledFile(path, read_json(path.with_name(CONSTANTS))["compile_options"])

    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.compiled(pixel_values, pixel_mask)


class ProgramRunner(Runner):
    """A torch program."""

    def __init__(self, path: Path, config: M2FConfig) -> None:
        super().__init__(config)
        # in a tuple, so that it is no submodule: train() and eval() would raise
        self.programs = (torch.export.load(path).module(),)

    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        classes, masks = self.programs[0](pixel_values, pixel_mask)
        return classes, masks


class PackageRunner(Runner):
    """An AOTInductor package."""

    def __init__(self, path: Path, config: M2FConfig) -> None:
        from torch._inductor import aoti_load_package

        super().__init__(config)
        self.package = aoti_load_package(str(path))

    def run(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        classes, masks = self.package(pixel_values, pixel_mask)
        return classes, masks


RUNNERS = {
    FILES["onnx"]: OnnxRunner,
    FILES["openvino"]: OpenVinoRunner,
    FILES["torch"]: ProgramRunner,
    FILES["aotinductor"]: PackageRunner,
}


def measure_parity(model: M2FModel, path: Path, rows: Dataset, limits: ParityLimits, fixed_size: bool) -> Parity:
    """Run model and file on the images of `rows`, one by one, and write parity.json beside the file."""
    original, exported = ModelRunner(model), RUNNERS[path.name](path, model.config)
    differences: list[list[float]] = []
    predictions: tuple[list[Instances], list[Instances]] = [], []
    size = 0.0
    for row in rows:
        image, ids = read_image(row), [row["image_id"]]
        for runner, found in zip((original, exported), predictions, strict=True):
            found += Predictor(runner)([image], threshold=0.0, image_ids=ids)  # type: ignore[arg-type]
        for model_logits, file_logits in zip(original.logits, exported.logits, strict=True):
            differences.append([_largest_difference(*pair) for pair in zip(model_logits, file_logits, strict=True)])
            size = max(size, float(model_logits[1].abs().max()))
        original.logits.clear()
        exported.logits.clear()
    overlaps = np.concatenate([best_ious(*pair) for pair in zip(*predictions, strict=True)])
    scorer = CocoMap(rows)
    classes, masks = np.max(differences, axis=0).tolist()
    parity = Parity(
        images=len(rows),
        class_logits=classes,
        mask_logits=masks,
        mask_logits_size=size,
        instances=len(overlaps),
        mask_iou=float(overlaps.mean()) if len(overlaps) else 1.0,
        mask_iou_lowest=float(overlaps.min()) if len(overlaps) else 1.0,
        model_ap=scorer(predictions[0])["map"],
        file_ap=scorer(predictions[1])["map"],
        model_seconds=statistics.median(original.seconds),
        file_seconds=statistics.median(exported.seconds),
        other_size=None if fixed_size else other_size_difference(original, exported),
        limits=limits,
    )
    write_json(path.with_name(REPORT), {**asdict(parity), "met": parity.met})
    return parity


def _largest_difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


@torch.inference_mode()
def other_size_difference(original: Runner, exported: Runner) -> float:
    """The largest difference of mask logits for two images of noise, one stride higher and two wider than the frame."""
    config, stride = original.config, frame_stride(original.config)
    height, width = config.image_height + stride, config.image_width + 2 * stride
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=noise, dtype=torch.uint8)
    valid = torch.ones(2, height, width, dtype=torch.bool)
    return _largest_difference(original.run(pixels, valid)[1], exported.run(pixels, valid)[1])


def best_ious(reference: Instances, other: Instances) -> NDArray[np.float64]:
    """The highest IoU (n,) of each instance of `reference` above `COMPARED` with one of its class in `other`."""
    kept = reference.above(COMPARED)
    if not len(kept) or not len(other):
        return np.zeros(len(kept))
    overlaps = np.asarray(coco_mask.iou(other.rles, kept.rles, [0] * len(kept)))  # (other, kept)
    same = other.category_ids[:, None] == kept.category_ids[None]
    best: NDArray[np.float64] = np.where(same, overlaps, 0.0).max(0)
    return best


def check_export(
    model: M2FModel,
    path: Path,
    rows: Dataset | None,
    images: int,
    limits: ParityLimits,
    fixed_size: bool,
) -> Parity:
    """`measure_parity` on the first `images` of `validation_rows`, by default of the synthetic sample dataset."""
    with tempfile.TemporaryDirectory() as folder:
        if rows is None:
            rows = load_coco(write_sample(folder, images=(1, images, 0)))["valid"]
        return measure_parity(model, path, rows.select(range(min(images, len(rows)))), limits, fixed_size)


def validation_rows(config: M2FConfig, dataset: Mapping[str, Any]) -> Dataset:
    """The valid split of a dataset, with the model's category ids (`match_rows`), read with its `pixel_range`.

    `dataset` holds the fields of a recipe that name a dataset.

    Raises:
        DataError: the dataset can't be read, has no valid split, or has categories of other names.
    """
    splits = load_recipe_dataset({**dataset, "pixel_range": pixel_range_text(model_range(config.pixel_range))})
    check_split(splits, "valid")
    return match_rows([Category(**category) for category in config.categories or []], splits["valid"])


def recorded_dataset(folder: Path) -> dict[str, Any] | None:
    """The recipe that a run records; None if there is none, or its dataset is not here."""
    recipe = read_json(folder / RECIPE)
    name = recipe.get("dataset_name")
    return recipe if name and Path(name).exists() else None
