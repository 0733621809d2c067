"""A simulated accelerator: tensors that compute on the CPU but report another device, and a counter of
synchronisations.

On an accelerator the host runs ahead of the device until it reads a value or copies without `non_blocking`; then it
waits. `Waits` counts the operations that do so: reading a value (`item`, `bool`, `tolist`), copies to the host,
blocking copies from the host, and results whose size depends on values (`nonzero`, a boolean index, `unique`,
`masked_select`, `repeat_interleave`).

It doesn't see what happens below PyTorch's operators (allocations, waits within a library's kernel), nor whether a
non-blocking copy really comes from pinned memory; `benchmarks.train_step --device cuda` counts on a real device.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps", 0)  # any type that autocast and checkpointing support, and that this machine lacks
aten = torch.ops.aten

WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.nonzero_numpy,
}  # fmt: skip


class Pretended(Tensor):
    """A tensor that reports `DEVICE`; its values are in `held`, on the CPU."""

    held: Tensor
    device = DEVICE  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, real: Tensor) -> "Pretended":
        made: Pretended = Tensor._make_wrapper_subclass(
            cls, real.shape, real.stride(), real.storage_offset(), dtype=real.dtype, device="meta"
        )
        made.held = real
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of Waits")


class Waits(TorchDispatchMode):
    """Runs all operations on the CPU, and counts in `seen` those for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(leaf, Pretended) for leaf in given)
        asked = kwargs.get("device")
        lands_there = there if asked is None else torch.device(asked).type in (DEVICE.type, "meta")
        self._note(func, args, kwargs, there, lands_there)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        outcome = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        mutated = func._schema.is_mutable
        if mutated and isinstance(outcome, Tensor):
            return next((leaf for leaf in given if _real(leaf) is outcome), outcome)
        return tree_map(lambda one: Pretended(one) if isinstance(one, Tensor) and lands_there else one, outcome)

    def _note(self, func: Any, args: Any, kwargs: Mapping[str, Any], there: bool, lands_there: bool) -> None:
        name, packet = func._schema.name, func.overloadpacket
        if packet in WAITING and there:
            self.seen[name] += 1
        elif packet in (aten.index, aten.index_put, aten.index_put_) and there:
            self.seen[f"{name} by booleans"] += any(_is_boolean(index) for index in args[1])
        elif packet is aten.repeat_interleave and there:
            self.seen[name] += kwargs.get("output_size") is None
        elif packet is aten._to_copy and there and not lands_there:
            self.seen["copy to the host"] += 1
        elif packet is aten._to_copy and lands_there and not there:
            self.seen["blocking copy from the host"] += not kwargs.get("non_blocking", False)
        elif packet is aten.copy_ and isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
            waits = not (isinstance(args[0], Pretended) and len(args) > 2 and args[2])
            self.seen["copy between host and device"] += waits

    @property
    def total(self) -> int:
        """How many times the host waited."""
        return self.seen.total()


def _real(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def _is_boolean(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the simulated device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Pretended(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Pretended(buffer)
    return module


def sent(value: Any) -> Any:
    """A batch on the simulated device."""
    to: Callable[[Any], Any] = lambda one: Pretended(one) if isinstance(one, Tensor) else one  # noqa: E731
    return tree_map(to, value)
