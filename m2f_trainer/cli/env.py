"""`m2f env`: versions, devices, optional packages and caches, for a bug report."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence

from m2f_trainer.cli.console import say
from m2f_trainer.version import __version__

SUMMARY = "versions, devices, optional packages and caches, for a bug report"
DESCRIPTION = "Print what a bug report needs. Contains no token and no path outside the caches."
EXAMPLES = ("m2f env",)

REQUIRED = (
    "torch", "transformers", "accelerate", "datasets", "evaluate", "pycocotools", "peft", "safetensors",
    "huggingface_hub", "scipy", "pillow", "numpy", "jinja2", "matplotlib",
)  # fmt: skip
OPTIONAL = {
    "hotcoco": "faster COCO evaluation",
    "triton": "fused deformable attention on CUDA",
    "onnx": "m2f export",
    "onnxscript": "m2f export",
    "onnxruntime": "m2f export",
    "openvino": "m2f export --format openvino",
    "nncf": "m2f export --int8",
    "fastapi": "m2f serve",
    "uvicorn": "m2f serve",
    "python-multipart": "m2f serve",
    "prometheus-client": "m2f serve",
    "tifffile": "large TIFF files, read window by window",
    "av": "video",
    "pillow-heif": "HEIC photos",
    "tensorboard": "the default logger",
    "deepspeed": "ZeRO 2",
    "supervision": "Instances.to_supervision",
}
"""Package -> what it is used for."""


def add_options(_: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    used_for = {name: f"{installed_version(name)}  ({use})" for name, use in OPTIONAL.items()}
    caches = {"models": HF_HUB_CACHE, "datasets": str(HF_DATASETS_CACHE), "offline": "yes" if HF_HUB_OFFLINE else "no"}
    system = {"m2f_trainer": __version__, "python": platform.python_version(), "system": platform.platform()}
    for title, rows in (
        ("versions", {**system, **{name: installed_version(name) for name in REQUIRED}}),
        ("devices", dict(devices())),
        ("optional packages", used_for),
        ("caches (set HF_HOME to move them)", caches),
    ):
        say("\n".join([f"{title}:", *(f"  {name:<16} {value}" for name, value in rows.items()), ""]))


def installed_version(package: str) -> str:
    """The version of an installed package, or "-"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def devices() -> Iterator[tuple[str, str]]:
    """Name and description of the processors that torch can use here."""
    import torch

    from m2f_trainer.config.cores import usable_cores

    yield "cpu", f"{usable_cores()} usable of {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "cuda", torch.version.cuda or "-"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
        yield f"cuda:{index}", f"{card.name}, {card.total_memory / 1e9:.0f} GB, {bf16}"
    if torch.backends.mps.is_available():
        yield "mps", "available"
