"""Roofline model of a training step on a GPU, computed without one: operators counted on fake tensors.

python -m benchmarks.roofline --backbone vitl16 --tune full --card h200
python -m benchmarks.roofline --backbone vits16plus --tune frozen --card h100

The step is the forward and backward pass of backbone, neck and decoders under bfloat16 autocast, ours beside
transformers' own. The losses are left out: the number of their operators depends on values. An operator takes the
longer of two times: its arithmetic at the rate of its type, and its bytes (every input read once, every output
written once) at the rate of the memory. Real kernels are slower, so the result is a lower bound; RESULTS.md compares
it with a measured step. The number of kernels matters too: the host starts them one by one, which limits a step whose
kernels are short.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from benchmarks.stock import BACKBONES, our_model, stock_model
from m2f_trainer.model.lora import set_tuning


@dataclass(frozen=True)
class Card:
    """Attainable rates: floating-point operations per second by type; bytes per second of the memory and the caches."""

    bf16: float
    tf32: float
    memory: float
    cache: float


CARDS = {
    "h100": Card(bf16=790e12, tf32=390e12, memory=3.0e12, cache=12e12),
    "h200": Card(bf16=790e12, tf32=390e12, memory=4.3e12, cache=12e12),
    "a100": Card(bf16=260e12, tf32=130e12, memory=1.7e12, cache=5e12),
}
"""H100 and H200: a matrix product of 8192 x 8192 and a device-to-device copy, measured; TF32 is half of the former; the
caches' rate is what the Triton kernels reached on an H200. A100: four fifths of the data sheet."""

PARTS = {
    "pixel_level_module.encoder": "backbone and neck",
    "pixel_level_module.decoder": "pixel decoder",
    "transformer_module": "transformer decoder",
}


@dataclass
class Counter(TorchDispatchMode):
    """Adds up the seconds and the operators of each part of a model."""

    card: Card
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    launches: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.modules = ModuleTracker()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # stock tests whether values are finite
            return True
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not any(
            word in str(func) for word in ("detach", "empty", "_unsafe_view", "prim.device")
        ):
            self.seconds[self._part()] += self._seconds(func, args, kwargs or {}, result)
            self.launches += 1
        return result

    def _part(self) -> str:
        names = self.modules.parents
        return next((part for key, part in PARTS.items() if any(key in name for name in names)), "other")

    def _seconds(self, func: Any, args: Any, kwargs: Any, result: Any) -> float:
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        moved = sum(one.numel() * one.element_size() for one in tensors) / self.card.memory
        if "deformable_attention::" in str(func):  # each sample reads four rows, and adds to four in backward
            samples = args[2].numel() * 4 * args[0].shape[-1] * 4 / self.card.cache
            return max(moved, samples * (3 if "backward" in str(func) else 1))
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            return float(moved)
        half = all(one.dtype != torch.float32 for one in tensors[:2])
        return float(max(moved, count(*args, **kwargs, out_val=result) / (self.card.bf16 if half else self.card.tf32)))


def step(build: Callable[[], nn.Module], card: Card, batch: int, side: int) -> Counter:
    """Count the forward and backward pass of a model without its losses."""
    model = build().train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, one in tensors.items():
                    tensors[name] = None if one is None else fake.from_tensor(one)
        pixels = torch.empty(batch, 3, side, side)
        counter = Counter(card)
        with counter.modules, counter:
            with torch.autocast("cpu", torch.bfloat16):
                outputs: Any = model(pixels)
            tensors = [one for one in tree_leaves(_values(outputs)) if isinstance(one, Tensor) and one.requires_grad]
            torch.autograd.backward([one.sum() for one in tensors])
    return counter


def _values(outputs: Any) -> Any:
    return outputs if isinstance(outputs, tuple) else outputs.to_tuple()


def main() -> None:
    """Print the seconds of each part, ours and stock."""
    arguments = _arguments()
    card = CARDS[arguments.card]

    def ours() -> Any:
        model = our_model(arguments.backbone, arguments.side, num_queries=arguments.queries)
        set_tuning(model, arguments.tune)
        return model

    counters = {
        "ours": step(lambda: ours().model, card, arguments.batch, arguments.side),
        "stock": step(lambda: stock_model(ours()).model, card, arguments.batch, arguments.side),
    }
    print(f"Roofline model, not a measurement: {vars(arguments)}\n\n| part | ours ms | stock ms |\n| --- | --- | --- |")
    mine, theirs = (counter.seconds for counter in counters.values())
    for part in sorted(mine.keys() | theirs.keys()):
        print(f"| {part} | {1e3 * mine[part]:.1f} | {1e3 * theirs[part]:.1f} |")
    totals = [sum(seconds.values()) for seconds in (mine, theirs)]
    print(f"| together | {1e3 * totals[0]:.1f} | {1e3 * totals[1]:.1f} |")
    print(f"| kernels launched | {counters['ours'].launches} | {counters['stock'].launches} |")
    print(f"\nratio {totals[1] / totals[0]:.2f}")


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--backbone", default="vitl16", choices=list(BACKBONES))
    made.add_argument("--tune", default="full", choices=["full", "lora", "frozen"])
    made.add_argument("--card", default="h200", choices=list(CARDS))
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--side", type=int, default=1024)
    made.add_argument("--queries", type=int, default=200)
    return made.parse_args()


if __name__ == "__main__":
    main()
