"""CUDA graphs without a GPU: the operators of a recording, run again on the same tensors.

As with a real graph, a replay reads and writes the memory of the recording, and nothing but the operators is repeated:
what Python computed stays as it was. Reading a value while recording is an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PretendGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.steps.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operators again."""
        for func, args, kwargs, made in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)

    def pool(self) -> None:
        """No pool: the recorded tensors are kept."""


@contextmanager
def recording(graph: PretendGraph, pool: None = None) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""
    with graph:
        yield


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace CUDA's graphs and streams in `torch.cuda`."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "CUDAGraph": PretendGraph, "graph": recording, "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": nullcontext, "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
