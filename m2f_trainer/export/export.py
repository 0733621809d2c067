"""Export a model for other runtimes, as ONNX, OpenVINO, a torch program or machine code, with the constants to use it.

The graph takes unnormalised uint8 pixels, normalises them and returns the logits. It contains only standard operators
(deformable attention becomes GridSample, or Gather). With dynamic height and width the graph is traced on a frame that
is neither square nor of the model's size, so that the tracer treats no side as a constant.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from m2f_trainer.data.tiles import tiling_of
from m2f_trainer.errors import ModelFolderError, needs
from m2f_trainer.export.aotinductor import check_compiler, compile_program, supported_machines
from m2f_trainer.export.openvino import compile_options, convert_onnx
from m2f_trainer.export.quantize import CalibrationFrame, quantize_onnx
from m2f_trainer.inference.postprocess import most_instances
from m2f_trainer.inference.predictor import DEFAULT_THRESHOLD
from m2f_trainer.inference.tiles import CANDIDATES, COVERED, CUT_SCORE, SAME_OBJECT
from m2f_trainer.model.backbones import stride_of
from m2f_trainer.model.deformable_attention import exported_as
from m2f_trainer.model.deformable_gather import attend_gather
from m2f_trainer.model.deformable_grid import attend_grid
from m2f_trainer.model.mask2former import M2FConfig, M2FModel
from m2f_trainer.run_folder import check_no_links, write_json

OPSET = 18
FEWEST_STRIDES, MOST_STRIDES = 4, 512
"""Limits of a side of a graph with dynamic size, in strides. From 4 strides the coarsest map has at least 2 cells."""

ONE_SIZE = ("hiera", "swin", "swinv2")
"""Families of backbones whose traces hold for one size of images. That of a Swin for any size takes minutes to fail."""

FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2", "aotinductor": "model.aoti.pt2"}
CONSTANTS = "model.json"
INPUTS, OUTPUTS = ("pixel_values", "pixel_mask"), ("class_logits", "mask_logits")
_FIXED_SIZE = "Export it with --fixed_size, for images of the model's own size"
_ONE_FILE = 2**31 - 2**24  # bytes; protobuf allows less than 2 GiB


class Graph(nn.Module):
    """The exported module: uint8 pixels (B, 3, H, W) and a bool mask (B, H, W) -> class and mask logits in float32.

    With `half`, backbone and neck run in float16. The decoders stay in float32, as in training with autocast.
    """

    def __init__(self, model: M2FModel, half: bool = False) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.float16 if half else torch.float32
        for parameter in model.encoder.parameters() if half else ():  # buffers hold frequencies and stay in float32
            parameter.data = parameter.data.half()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), (B, H, W) -> (B, Q, K + 1) and (B, Q, H/4, W/4)."""
        output = self.model(self.model.normalise(pixel_values, pixel_mask).to(self.dtype))
        classes, masks = output.class_queries_logits, output.masks_queries_logits
        assert classes is not None
        assert masks is not None
        return classes.float(), masks.float()


def export_model(
    model: M2FModel,
    form: str,
    output_dir: Path,
    *,
    half: bool = False,
    fixed_size: bool = False,
    portable: bool = False,
    calibration: Sequence[CalibrationFrame] | None = None,
) -> Path:
    """Write the model file (see `FILES`) and model.json to `output_dir`; return the path of the model file.

    Args:
        form: one of `FILES`. OpenVINO's model.xml has its weights beside it, in model.bin.
        half: backbone and neck in float16; for OpenVINO all weights in float16, and the device's preferred arithmetic.
        fixed_size: accept only images of the model's own frame size; the batch size stays dynamic.
        portable: deformable attention by Gather instead of GridSample, for runtimes that lack the latter.
        calibration: frames to quantize the model to int8 with (see `quantize`), for OpenVINO only.

    Raises:
        MissingPackageError: the packages of the format are not installed, or the C++ compiler that it needs.
        ModelFolderError: the backbone can't be traced, or a file of `output_dir` is a link.
    """
    if form == "onnx":
        needs("onnx", "onnxscript", "onnxruntime", extra="export")
    elif form == "openvino":
        needs("onnx", "onnxscript", "openvino", extra="openvino")
        if calibration is not None:
            needs("nncf", extra="int8")
    elif form == "aotinductor":
        check_compiler()
    check_no_links(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / FILES[form]
    with quiet_exporters():
        with exported_as(attend_gather if portable else attend_grid):
            program = trace(Graph(model, half and form != "openvino"), model.config, fixed_size)
        constants = export_constants(model.config, form, half=half, fixed_size=fixed_size)
        if form == "onnx":
            constants["operators"] = _write_onnx(program, path)
        elif form == "openvino":
            # through ONNX: OpenVINO's converter of torch programs lacks resizing with antialias (2026.4)
            with tempfile.TemporaryDirectory(dir=output_dir) as folder:
                onnx_file = Path(folder, FILES["onnx"])
                _write_onnx(program, onnx_file)
                if calibration is None:
                    convert_onnx(onnx_file, path, half)
                else:
                    constants["int8"] = {"left_in_float": quantize_onnx(onnx_file, path, calibration, half)}
                    constants["precision"] = f"int8 in part, otherwise {constants['precision']}"
        elif form == "torch":
            save_program(program, path)
        else:
            compile_program(program, path)
    write_json(output_dir / CONSTANTS, constants)
    return path


def trace(graph: Graph, config: M2FConfig, fixed_size: bool) -> torch.export.ExportedProgram:
    """Trace the graph with a dynamic batch size and, unless `fixed_size`, dynamic height and width.

    Raises:
        ModelFolderError: torch can't trace it, or only for one size of images.
    """
    if not fixed_size:
        _check_any_size(config)
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
        with torch.no_grad(), symbolic_sizes(graph.model.encoder.backbone):
            program = torch.export.export(graph.eval(), example, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        advice = "" if fixed_size else f". {_FIXED_SIZE}"
        raise ModelFolderError(f"{_named(config)} can't be traced by torch.export: {first}{advice}") from error
    if not fixed_size:
        _check_another_size(program, config)
    return program


def _named(config: M2FConfig) -> str:
    assert isinstance(config.backbone_config, PreTrainedConfig)
    return f"this model with a {config.backbone_config.model_type!r} backbone"


def _check_any_size(config: M2FConfig) -> None:
    """Refuse a model whose file can only take images of one size, before minutes are spent on it.

    Raises:
        ModelFolderError: the backbone is one of `ONE_SIZE`, or the model's own frame is below `FEWEST_STRIDES`.
    """
    assert isinstance(config.backbone_config, PreTrainedConfig)
    if config.backbone_config.model_type in ONE_SIZE:
        raise ModelFolderError(f"{_named(config)} can't be exported for images of any size. {_FIXED_SIZE}")
    height, width, smallest = config.image_height, config.image_width, FEWEST_STRIDES * frame_stride(config)
    if min(height, width) < smallest:
        raise ModelFolderError(
            f"{_named(config)} takes images of {height} x {width}, and a file for images of any size takes those from "
            f"{smallest} x {smallest} on. {_FIXED_SIZE}"
        )


def _check_another_size(program: torch.export.ExportedProgram, config: M2FConfig) -> None:
    """Run the program on a small image: torch.export doesn't notice every size that became constant.

    Raises:
        ModelFolderError: the program takes no other size than that of the example.
    """
    height, width = ((FEWEST_STRIDES + more) * frame_stride(config) for more in (1, 2))
    try:
        with torch.no_grad():
            program.module()(
                torch.zeros(1, 3, height, width, dtype=torch.uint8), torch.ones(1, height, width, dtype=torch.bool)
            )
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelFolderError(
            f"{_named(config)} takes images of one size only once it is traced: {first}. {_FIXED_SIZE}"
        ) from error


@contextmanager
def symbolic_sizes(backbone: nn.Module) -> Iterator[None]:
    """Keep the sizes of images symbolic in a trace, without conditions.

    transformers' `torch_int` would turn sizes into constants. Its ViTs don't interpolate position embeddings at their
    pretraining size, unless `torch.jit` traces, although this changes nothing: the program would refuse that size.
    """
    replaced: list[tuple[dict[str, Any], str, Callable[..., Any]]] = [(vars(torch.jit), "is_tracing", lambda: True)]
    module = vars(sys.modules[type(backbone).__module__])
    if to_int := module.get("torch_int"):
        replaced.append((module, "torch_int", lambda size: size if isinstance(size, torch.SymInt) else to_int(size)))
    originals = [names[name] for names, name, _ in replaced]
    for names, name, replacement in replaced:
        names[name] = replacement
    try:
        yield
    finally:
        for (names, name, _), original in zip(replaced, originals, strict=True):
            names[name] = original


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a torch program.

    A weight without elements gets memory of its own: torch (2.13) takes one that points into other memory, as those of
    loaded files do, for a part of a larger tensor, and fails to find its size.
    """
    for tensor in program.state_dict.values():
        if not tensor.numel():
            tensor.data = torch.zeros_like(tensor)
    torch.export.save(program, path)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> list[str]:
    """Write the file; return the names of its operators."""
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
    return sorted({node.op_type for node in converted.model.graph.all_nodes()})


def frame_stride(config: M2FConfig) -> int:
    """The number that height and width of a frame must be multiples of."""
    assert isinstance(config.backbone_config, PreTrainedConfig)
    return stride_of(config.backbone_config)


def export_constants(config: M2FConfig, form: str, *, half: bool, fixed_size: bool) -> dict[str, Any]:
    """The content of model.json: inputs and outputs of the graph, and the constants of pre- and postprocessing."""
    from m2f_trainer.version import __version__

    height, width, stride = config.image_height, config.image_width, frame_stride(config)
    sides = f"multiples of {stride}, from {FEWEST_STRIDES * stride} to {MOST_STRIDES * stride}"
    sides = f"{height} x {width} only" if fixed_size else sides
    halved = "float16 weights" if form == "openvino" else "float16 backbone and neck, float32 decoders"
    return {
        "made_by": f"m2f_trainer {__version__}",
        "file": FILES[form],
        "precision": halved if half else "float32",
        **({"compile_options": compile_options(half)} if form == "openvino" else {}),
        **({"runs_on": supported_machines()} if form == "aotinductor" else {}),
        "inputs": {
            "pixel_values": "uint8 (batch, 3, height, width): RGB, resized and padded",
            "pixel_mask": "bool (batch, height, width): true on the image, false on padding",
            "sides": f"{sides}; not checked by the file" if form == "aotinductor" else sides,
        },
        "outputs": {
            "class_logits": f"float32 (batch, {config.num_queries}, {len(config.categories or []) + 1}): "
            "the classes in the order of `categories`, then no object",
            "mask_logits": f"float32 (batch, {config.num_queries}, height / 4, width / 4), rounded to the "
            "backbone's strides",
        },
        "preprocessing": {
            "pixel_range": config.pixel_range,
            "scale": "images of more than 8 bits only: round(255 (value - low) / (high - low)), clipped to 0 and 255, "
            "with [low, high] = pixel_range; [0, 65535] if it is null; the 0.1th and 99.9th percentile of each image "
            'if it is "image"',
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
            "masks": "mask_logits resized bilinearly (half-pixel centres, edges repeated, no antialias) to the padded "
            "frame, cropped to the resized image, resized bilinearly to the original size; the mask is where the "
            "result is above mask_threshold",
            "score": "class probability x mean of sigmoid(resized logit) inside the mask",
            "top_k": most_instances(config.num_queries),
            "mask_threshold": 0.0,
            "thresholds": config.thresholds or [DEFAULT_THRESHOLD] * len(config.categories or []),
            "categories": config.categories or [],
        },
        "tiles": tile_constants(config),
    }


def tile_constants(config: M2FConfig) -> dict[str, Any] | None:
    """How images are cut into tiles, and the instances of these merged; None for a model of whole images."""
    tiling = tiling_of(config)
    if tiling is None:
        return None
    return {
        "side": tiling.side,
        "overlap": tiling.overlap,
        "candidates": CANDIDATES,
        "same_object": SAME_OBJECT,
        "covered": COVERED,
        "cut_score": CUT_SCORE,
        "layout": "on an axis of n pixels: s = min(side, n); d = min(s - 1, ceil(side x overlap)); "
        "m = max(1, ceil((n - d) / (s - d))) tiles of s pixels; tile k starts at round(k (n - s) / max(1, m - 1)), "
        "halves to even; tiles are numbered row by row. Cores, which partition the image: neighbours a and b on an "
        "axis are divided at floor((end of a + start of b) / 2)",
        "resize": "instead of preprocessing's, for tiles at the image's edges too: scale = min(image_height, "
        "image_width) / side; each side of the tile round(side x scale), at least 1; the same filter and padding",
        "prediction": "of each tile as of an image, with top_k for each tile. Its instances, called pieces, are those "
        "with a mask whose class probability is above `candidates`, or above the lowest of `thresholds` if that is "
        "lower; merged scores are compared with the threshold of their class",
        "merging": [
            "only pieces of one class are compared, at each step in descending order of score; a piece becomes an "
            "object unless its IoU with one of the objects so far exceeds same_object",
            "of each tile, a piece whose IoU with a better one that is kept exceeds same_object is dropped",
            "a piece is cut if it touches an edge of its tile inside the image; pieces that are not cut become objects",
            "a cut piece is covered, and dropped, if one object contains more than the fraction `covered` of it",
            "two cut pieces of neighbouring tiles (at sides or corners) agree if their IoU inside the overlap of the "
            "tiles exceeds same_object; in descending order of this IoU, their groups are joined, unless both groups "
            "have a piece of the same tile",
            "a group of several pieces is stitched from each piece's mask inside the core of its tile; its score is "
            "the mean of theirs, weighted by their pixels there; the stitched pieces become objects",
            "a cut piece alone is dropped if less than half of it lies in its tile's core, or if it is covered now; "
            "otherwise its score is multiplied by cut_score, and it becomes an object",
        ],
    }


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Suppress log messages and warnings of the exporters, which no user can act on."""
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
