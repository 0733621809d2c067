"""Quantize an exported model to 8-bit integers after training, with NNCF, for OpenVINO.

Quantized are the first layers of the backbone's feed-forward blocks, and convolutions and linear layers of the pixel
decoder. The rest stays in float. Mean IoU of the masks with those of the float model if one part alone is quantized, on
tiles of nuclei (DINOv2 ViT-S/14 with LoRA):

    pixel decoder                       0.998
    first feed-forward layers           0.993
    second feed-forward layers          0.967
    projections of the attention        0.957
    neck                                0.937
    all of these                        0.876, and 5.7 points less AP

Sampling positions and weights of deformable attention, masked attention, the heads and the product that gives the masks
decide which pixels and which queries are taken, and were not tried. The last convolution of the pixel decoder stays in
float, too: with it in int8, all masks of a small random model were 0. NNCF smooths the activations of linear layers
first (SmoothQuant, Xiao et al. 2023, https://arxiv.org/abs/2211.10438).
"""

from __future__ import annotations

import ast
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from m2f_trainer.data.transforms import read_image
from m2f_trainer.export.openvino import import_openvino
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.model.mask2former import M2FModel

CalibrationFrame = tuple[NDArray[np.uint8], NDArray[np.bool_]]
"""pixel_values (1, 3, H, W) and pixel_mask (1, H, W)."""

CALIBRATION_FRAMES, FRAMES_PER_IMAGE = 128, 4
PRODUCTS = ("MatMul", "Einsum", "Convolution", "GroupConvolution", "ConvolutionBackpropData")
"""OpenVINO's operators that do most of the arithmetic."""

_BACKBONE, _PIXEL_DECODER = "model.pixel_level_module.encoder.backbone.", "model.pixel_level_module.decoder."
_FEED_FORWARD = ("fc1", "gate_proj", "up_proj", "weights_in", "intermediate.dense", "pointwise_conv1")
"""Names of the first layers of feed-forward blocks in transformers' backbones."""
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node of an ONNX file: the modules that it is in, from outer to inner
_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Concat", "MaxPool")  # of values, without arithmetic


def calibration_frames(model: M2FModel, rows: Dataset, compared: int) -> list[CalibrationFrame]:
    """At most 128 frames of the rows, at most 4 of an image; the first `compared` images are taken last.

    Those are the images that the quantized file is compared on. Raises ImageError if an image can't be read.
    """
    first = min(compared, len(rows))
    order = [*range(first, len(rows)), *range(first)]
    predictor = Predictor(model)

    def frames() -> Iterator[CalibrationFrame]:
        for index in order:
            found = list(predictor.frames([read_image(rows[index])]))
            for frame in found[:: -(-len(found) // FRAMES_PER_IMAGE)]:
                yield frame.pixel_values.unsqueeze(0).numpy(), frame.pixel_mask.unsqueeze(0).numpy()

    return list(islice(frames(), CALIBRATION_FRAMES))


def quantize_onnx(onnx_file: Path, output: Path, frames: Sequence[CalibrationFrame], half: bool) -> list[str]:
    """Convert an ONNX file to OpenVINO's `output` (.xml) in int8; return the modules that are left in float."""
    openvino = import_openvino()  # before nncf, which would import its telemetry
    import nncf

    nncf.set_log_level(logging.ERROR)
    scopes = node_scopes(onnx_file)
    model = openvino.Core().read_model(onnx_file)
    names = [operation.get_friendly_name() for operation in model.get_ops()]
    with redirect_stdout(io.StringIO()):  # progress bars
        quantized = nncf.quantize(
            model,
            nncf.Dataset(frames, list),
            subset_size=len(frames),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(
                names=[name for name in names if stays_in_float(scope_of(name, scopes))], validate=False
            ),
        )
    openvino.save_model(quantized, output, compress_to_fp16=half)
    return modules_in_float(quantized, scopes)


def node_scopes(onnx_file: Path) -> dict[str, str]:
    """Name of each node of an ONNX file -> the innermost module that it is in, "" for the model itself."""
    import onnx

    nodes = onnx.load(onnx_file, load_external_data=False).graph.node
    properties = {node.name: {entry.key: entry.value for entry in node.metadata_props} for node in nodes}
    return {name: _module(ast.literal_eval(values.get(_SCOPES, "['']"))) for name, values in properties.items()}


def _module(scopes: list[str]) -> str:
    """The innermost module, without the name of the wrapper that is exported; the last scope is the node's own name."""
    modules = [scope.removeprefix("model.") for scope in scopes[:-1] if scope.startswith("model.")]
    return modules[-1] if modules else ""


def scope_of(operation: str, scopes: Mapping[str, str]) -> str:
    """The module of an OpenVINO operation, which has the name of its ONNX node, maybe with a suffix after a slash."""
    return scopes.get(operation.split("/")[0], "")


def stays_in_float(module: str) -> bool:
    """Whether operations whose innermost module is `module` are not quantized."""
    if module.startswith(_BACKBONE):
        return not module.endswith(_FEED_FORWARD)
    return not module.startswith(_PIXEL_DECODER) or module == f"{_PIXEL_DECODER}mask_projection"


def modules_in_float(model: Any, scopes: Mapping[str, str]) -> list[str]:
    """The modules with matrix products or convolutions whose inputs are not quantized, sorted."""
    found = set()
    for operation in model.get_ops():
        if operation.get_type_name() in PRODUCTS:
            source = operation.input_value(0).get_node()
            while source.get_type_name() in _MOVES:
                source = source.input_value(0).get_node()
            if source.get_type_name() != "FakeQuantize":
                found.add(scope_of(operation.get_friendly_name(), scopes) or "(the model itself)")
    return sorted(found)
