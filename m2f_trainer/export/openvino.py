"""OpenVINO: convert an ONNX file to OpenVINO's format, and run it.

OpenVINO computes in bfloat16 by default on CPUs that have instructions for it, which changes the logits by several
percent. A file in float32 must be compiled with `INFERENCE_PRECISION_HINT` "f32"; model.json contains this option.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2f_trainer.errors import needs


def import_openvino() -> Any:
    """The module openvino, imported without its telemetry: no usage data is sent from this process.

    Raises:
        MissingPackageError: it is not installed.
    """
    needs("openvino", extra="openvino")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its import then fails, as intended
    import openvino

    return openvino


def compile_options(half: bool) -> dict[str, str]:
    """Options of `compile_model`: float32, or with `half` the arithmetic that the device prefers."""
    return {} if half else {"INFERENCE_PRECISION_HINT": "f32"}


def convert_onnx(path: Path, output: Path, half: bool) -> None:
    """Convert an ONNX file to `output` (.xml) and weights beside it (.bin), which are float16 with `half`."""
    openvino = import_openvino()
    openvino.save_model(openvino.Core().read_model(path), output, compress_to_fp16=half)


class CompiledFile:
    """An OpenVINO file, compiled for the CPU with as many threads as torch uses."""

    def __init__(self, path: Path, options: dict[str, str]) -> None:
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.model = import_openvino().Core().compile_model(path, "CPU", {**options, **threads})

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) and bool (B, H, W) -> (B, Q, K + 1) and (B, Q, H/4, W/4)."""
        outputs = self.model([pixel_values.numpy(), pixel_mask.numpy()], share_outputs=False)
        return torch.from_numpy(outputs[0]), torch.from_numpy(outputs[1])
