"""Whether bfloat16 makes this machine faster."""

import functools
import time

import torch
from torch import Tensor

ROUNDS = 8
WORTH_IT = 0.9
"""Share of float32's time below which bfloat16 is chosen; autocast's casts take some time of their own."""


def gpu_computes_in_bf16() -> bool:
    """Whether the GPU has bfloat16 units; emulation would be slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def cpu_is_faster_in_bf16() -> bool:
    """Whether a linear layer of a small ViT takes less time in bfloat16 than in float32 on this CPU.

    It is measured, once in a process, in less than a tenth of a second. The instructions alone don't tell: with AVX-512
    BF16 but without AMX, which some virtual machines hide, an Intel Xeon takes 1.7 times as long in bfloat16.
    """
    weight, rows = torch.ones(384, 384), torch.ones(512, 384)
    operands = {kind: (rows.to(kind), weight.to(kind)) for kind in (torch.float32, torch.bfloat16)}
    taken: dict[torch.dtype, list[float]] = {kind: [] for kind in operands}
    for _ in range(ROUNDS):
        for kind, pair in operands.items():
            taken[kind].append(_seconds(*pair))
    return min(taken[torch.bfloat16]) < WORTH_IT * min(taken[torch.float32])


def _seconds(rows: Tensor, weight: Tensor) -> float:
    begun = time.perf_counter()
    with torch.no_grad():
        torch.nn.functional.linear(rows, weight)
    return time.perf_counter() - begun
