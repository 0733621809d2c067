"""A model as one file for other runtimes, ONNX or a torch program, with the constants to use it in a JSON beside it.

The graph takes pixels as they are, normalises them itself, and ends at the logits; it has standard operators alone
(deformable attention becomes GridSample). Free sizes are traced from a frame that is neither square nor the model's,
so that no side is mistaken for a constant.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from m2f_trainer.errors import ModelFolderError, needs
from m2f_trainer.model.backbones import stride_of
from m2f_trainer.model.mask2former import M2FConfig, M2FModel
from m2f_trainer.run_folder import write_json

OPSET = 18
FEWEST_STRIDES, MOST_STRIDES = 4, 512
"""Sides of a graph of free size, in strides: a side's coarsest map has at least two cells."""

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
CONSTANTS = "model.json"
INPUTS, OUTPUTS = ("pixel_values", "pixel_mask"), ("class_logits", "mask_logits")
_ONE_FILE = 2**31 - 2**24  # bytes: protobuf ends at 2 GiB


class Graph(nn.Module):
    """What is exported: uint8 pixels (B, 3, H, W) and a bool mask (B, H, W) -> class and mask logits, both float32.

    `half` keeps backbone and neck in float16; the decoders stay in float32, as in training with autocast.
    """

    def __init__(self, model: M2FModel, half: bool = False) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.float16 if half else torch.float32
        for parameter in model.encoder.parameters() if half else ():  # buffers hold frequencies: they stay exact
            parameter.data = parameter.data.half()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), (B, H, W) -> (B, Q, K + 1) and (B, Q, H/4, W/4)."""
        output = self.model(self.model.normalise(pixel_values, pixel_mask).to(self.dtype))
        classes, masks = output.class_queries_logits, output.masks_queries_logits
        assert classes is not None
        assert masks is not None
        return classes.float(), masks.float()


def export_model(model: M2FModel, form: str, output_dir: Path, *, half: bool = False, fixed_size: bool = False) -> Path:
    """Write model.onnx or model.pt2 and model.json to `output_dir`; return the path of the first.

    Args:
        form: "onnx" or "torch".
        half: backbone and neck in float16.
        fixed_size: take images of the model's own frame only; the batch stays free.

    Raises:
        MissingPackageError: "onnx" without the extra `export`.
        ModelFolderError: the backbone can't be traced.
    """
    if form == "onnx":
        needs("onnx", "onnxscript", "onnxruntime", extra="export")
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / FILES[form]
    with quietly():
        program = trace(Graph(model, half), model.config, fixed_size)
        if form == "onnx":
            _write_onnx(program, path)
        else:
            torch.export.save(program, path)
    constants = describe(model.config, form, half=half, fixed_size=fixed_size)
    write_json(output_dir / CONSTANTS, constants)
    return path


def trace(graph: Graph, config: M2FConfig, fixed_size: bool) -> torch.export.ExportedProgram:
    """The graph as a program of standard operators, its batch free, and its sides too unless `fixed_size`.

    Raises:
        ModelFolderError: torch can't trace it.
    """
    stride = frame_stride(config)
    height, width = config.image_height, config.image_width + (0 if fixed_size else stride)
    example = torch.zeros(2, 3, height, width, dtype=torch.uint8), torch.ones(2, height, width, dtype=torch.bool)
    batch = torch.export.Dim("batch", min=1, max=1024)
    rows, columns = (
        stride * torch.export.Dim(name, min=FEWEST_STRIDES, max=MOST_STRIDES) for name in ("rows", "columns")
    )
    free = {0: batch} if fixed_size else {0: batch, 2: rows, 3: columns}
    shapes = (free, {axis - (axis > 0): dim for axis, dim in free.items()})
    try:
        with torch.no_grad():
            return torch.export.export(graph.eval(), example, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        advice = "" if fixed_size else " Try --fixed_size: images of one size are easier to trace."
        raise ModelFolderError(f"this model can't be traced by torch.export: {first}.{advice}") from error


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    converted = torch.onnx.export(
        program,
        input_names=INPUTS,
        output_names=OUTPUTS,
        opset_version=OPSET,
        dynamo=True,
        external_data=size > _ONE_FILE,
        verbose=False,
    )
    assert converted is not None
    converted.save(path, external_data=size > _ONE_FILE)


def frame_stride(config: M2FConfig) -> int:
    """What the sides of a frame must be multiples of."""
    assert isinstance(config.backbone_config, PreTrainedConfig)
    return stride_of(config.backbone_config)


def describe(config: M2FConfig, form: str, *, half: bool, fixed_size: bool) -> dict[str, Any]:
    """Everything that using the file takes: the graph's inputs and outputs, and the steps before and after it."""
    from m2f_trainer.version import __version__

    height, width, stride = config.image_height, config.image_width, frame_stride(config)
    sides = f"multiples of {stride}, from {FEWEST_STRIDES * stride} to {MOST_STRIDES * stride}"
    return {
        "made_by": f"m2f_trainer {__version__}",
        "file": FILES[form],
        "precision": "float16 backbone and neck, float32 decoders" if half else "float32",
        "inputs": {
            "pixel_values": "uint8 (batch, 3, height, width): RGB, resized and padded",
            "pixel_mask": "bool (batch, height, width): true where there is image, false where there is padding",
            "sides": f"{height} x {width} only" if fixed_size else sides,
        },
        "outputs": {
            "class_logits": f"float32 (batch, {config.num_queries}, {len(config.categories or []) + 1}): "
            "the classes in the order of `categories`, and last no object",
            "mask_logits": f"float32 (batch, {config.num_queries}, height / 4, width / 4), rounded as strides allow",
        },
        "preprocessing": {
            "image_height": height,
            "image_width": width,
            "resize": "scale = min(image_height / h, image_width / w); each side round(side x scale), at least 1; "
            "bilinear with antialias (Pillow's BILINEAR)",
            "pad": "zeros at the right and at the bottom, up to image_height x image_width",
            "normalise": "done in the graph: (pixel / 255 - mean) / std, padding 0",
            "mean": list(config.image_mean),
            "std": list(config.image_std),
        },
        "postprocessing": {
            "scores": "softmax of class_logits over all, the last column dropped; the top_k best (query, class) pairs",
            "masks": "mask_logits bilinearly (half-pixel centres, edges repeated, no antialias) to the padded frame, "
            "cropped to the resized image, bilinearly to the original size; the mask is where that is above "
            "mask_threshold",
            "score": "class probability x mean of sigmoid(resized logit) inside the mask",
            "top_k": 100,
            "mask_threshold": 0.0,
            "categories": config.categories or [],
        },
    }


@contextmanager
def quietly() -> Iterator[None]:
    """Without the exporters' own notes, which no user can act on."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
