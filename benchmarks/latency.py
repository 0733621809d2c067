"""Latency of one image in each runtime, network only: torch, torch.compile, AOTInductor, ONNX Runtime, OpenVINO, int8.

python -m benchmarks.latency --side 512 1024 --head original light tiny --rivals YOLO11n-seg RF-DETR-Seg-Nano

All networks have random weights, one input of noise and the same number of threads. The runtimes alternate, so that
other load affects all alike. int8 is calibrated on noise: its time does not depend on the values, and its accuracy is
measured by `m2f export --int8`. OpenVINO computes in float32; "bfloat16" rows let it choose the arithmetic, which is
bfloat16 on CPUs with instructions for it.

Rivals are exported to ONNX by their own packages, in an environment of their own under --environments, for the nearest
input size that they accept. Their postprocessing (and ours) is not included.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._inductor import aoti_load_package

from benchmarks.measure import Run, alternate, parser, report
from benchmarks.rivals.environments import prepare
from benchmarks.stock import BACKBONES, our_model
from m2f_trainer.config.arguments import HEADS
from m2f_trainer.export.export import FILES, INPUTS, Graph, export_model
from m2f_trainer.export.openvino import compile_options, import_openvino
from m2f_trainer.export.quantize import quantize_onnx

RUNTIMES = ("torch", "compiled", "aotinductor", "onnx", "openvino", "openvino bfloat16", "int8", "int8 bfloat16")
"""int8 and its bfloat16 row are the scheme of `m2f_trainer.export.quantize`."""


class RivalExport(NamedTuple):
    """Packages of a rival's environment, and a script that exports it to the current folder for the side in argv[1].

    The script prints the path of the ONNX file on its last line.
    """

    packages: tuple[str, ...]
    script: str


YOLO = """
import sys
from pathlib import Path
from ultralytics import YOLO
print(Path(YOLO("yolo11n-seg.yaml").export(format="onnx", imgsz=int(sys.argv[1]), simplify=False)).absolute())
"""
RF_DETR = """
import sys
from pathlib import Path
from rfdetr import RFDETRSegNano
step = 24  # patch size 12, windows of 2 x 2
side = round(int(sys.argv[1]) / step) * step
RFDETRSegNano(pretrain_weights=None, resolution=side, device="cpu").export(output_dir=".", shape=(side, side))
print(next(Path().absolute().glob("*.onnx")))
"""
RIVALS = {
    "YOLO11n-seg": RivalExport(("ultralytics", "onnx", "onnxscript"), YOLO),
    "RF-DETR-Seg-Nano": RivalExport(("rfdetr[onnx]",), RF_DETR),
}


def main() -> None:
    """Measure each network at each side, and print a table of milliseconds of CPU time."""
    made = parser(__doc__ or "")
    made.add_argument("--backbone", default="vits16plus", choices=list(BACKBONES))
    made.add_argument("--side", type=int, nargs="+", default=[512, 1024])
    made.add_argument("--head", nargs="+", default=list(HEADS), choices=list(HEADS))
    made.add_argument("--runtime", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    made.add_argument("--rivals", nargs="*", default=[], choices=list(RIVALS))
    made.add_argument("--environments", type=Path, default=Path("environments"), help="folder of the rivals' packages")
    made.add_argument("--repeats", type=int, default=5)
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in arguments.side:
            networks: dict[str, Mapping[str, Run]] = {}
            for head in arguments.head:
                networks[f"{arguments.backbone}, {head}"] = ours(arguments, head, side, Path(folder, head))
            for rival in arguments.rivals:
                networks[rival] = of_rival(arguments, rival, side, Path(folder, f"{rival}-{side}"))
            runs = {(name, runtime): run for name, some in networks.items() for runtime, run in some.items()}
            rows += table(alternate(runs, arguments.repeats), side)  # type: ignore[arg-type]
    report("Latency of one image, network only", rows, arguments)


def table(seconds: Mapping[tuple[str, str], Mapping[str, float]], side: int) -> list[dict[str, Any]]:
    """A row for each network and runtime; `ratio` is the CPU time of the network's first runtime over this one's."""
    first = {name: seconds[name, runtime]["cpu"] for name, runtime in reversed(seconds)}
    return [
        {
            "side": side,
            "network": name,
            "runtime": runtime,
            "cpu ms": 1000 * one["cpu"],
            "wall ms": 1000 * one["wall"],
            "ratio": first[name] / one["cpu"],
        }
        for (name, runtime), one in seconds.items()
    ]


def ours(arguments: argparse.Namespace, head: str, side: int, folder: Path) -> dict[str, Run]:
    """The runtimes of our network with a head. The files accept any size: they are written once, at the first side."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, side, side), dtype=np.uint8))
    mask = torch.ones(1, side, side, dtype=torch.bool)
    inputs = [pixels.numpy(), mask.numpy()]
    model = our_model(arguments.backbone, side, **HEADS[head]).eval()
    graph, int8_file = Graph(model), folder / "int8.xml"
    package, onnx_file = folder / FILES["aotinductor"], folder / FILES["onnx"]
    if not package.exists() and "aotinductor" in arguments.runtime:
        export_model(model, "aotinductor", folder)
    if not onnx_file.exists() and set(arguments.runtime) - {"torch", "compiled", "aotinductor"}:
        export_model(model, "onnx", folder)
    if not int8_file.exists() and any(name.startswith("int8") for name in arguments.runtime):
        quantize_onnx(onnx_file, int8_file, [(inputs[0], inputs[1])], half=False)

    def in_torch(network: Callable[..., object]) -> Run:
        def run() -> object:
            with torch.inference_mode():
                return network(pixels, mask)

        return run

    threads, in_float32 = arguments.threads, compile_options(half=False)
    made: dict[str, Callable[[], Run]] = {
        "torch": lambda: in_torch(graph),
        "compiled": lambda: in_torch(torch.compile(graph)),
        "aotinductor": lambda: in_torch(aoti_load_package(str(package))),
        "onnx": lambda: in_onnxruntime(onnx_file, threads, dict(zip(INPUTS, inputs, strict=True))),
        "openvino": lambda: in_openvino(onnx_file, threads, inputs, in_float32),
        "openvino bfloat16": lambda: in_openvino(onnx_file, threads, inputs, {}),
        "int8": lambda: in_openvino(int8_file, threads, inputs, in_float32),
        "int8 bfloat16": lambda: in_openvino(int8_file, threads, inputs, {}),
    }
    return {name: made[name]() for name in arguments.runtime}


def of_rival(arguments: argparse.Namespace, name: str, side: int, folder: Path) -> dict[str, Run]:
    """The runtimes of a rival's ONNX file."""
    rival = RIVALS[name]
    python = prepare(rival.packages, arguments.environments.absolute() / name)
    folder.mkdir()
    done = subprocess.run(
        [str(python), "-c", rival.script, str(side)],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    path = Path(done.stdout.splitlines()[-1])
    network = import_openvino().Core().read_model(path)
    shape = [int(length) for length in network.input(0).shape]
    pixels = np.random.default_rng(0).random(shape, dtype=np.float32)
    options: dict[str, dict[str, str]] = {"openvino": compile_options(half=False), "openvino bfloat16": {}}
    runs = {"onnx": in_onnxruntime(path, arguments.threads, {network.input(0).any_name: pixels})}
    for runtime, chosen in options.items():
        runs[runtime] = in_openvino(path, arguments.threads, [pixels], chosen)
    return {f"{runtime} ({shape[2]} px)": run for runtime, run in runs.items() if runtime in arguments.runtime}


def in_onnxruntime(path: Path, threads: int, inputs: Mapping[str, Any]) -> Run:
    """A call of an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(inputs))


def in_openvino(path: Path, threads: int, inputs: Any, options: Mapping[str, str]) -> Run:
    """A call of an OpenVINO or ONNX file."""
    compiled = import_openvino().Core().compile_model(path, "CPU", {**options, "INFERENCE_NUM_THREADS": threads})
    return lambda: compiled(list(inputs))


if __name__ == "__main__":
    main()
