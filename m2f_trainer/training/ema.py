"""A running average of the weights, which is what gets evaluated, saved and kept at the end.

The average of each trained weight lies in the optimiser's state beside its moments, so that it is sharded, saved and
restored as they are, to the last bit. While a model is evaluated or saved, weights and averages change places: a
checkpoint's model is the averaged one, and its optimiser's state holds the weights that training goes on from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGE = "average"


class Average(TrainerCallback):
    """Keeps an exponential moving average of what trains; LoRA factors are averaged as factors.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten (as in
    TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a resume the model holds the averages: change places."""
        swap(kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the new weights into the average."""
        updates = state.global_step + 1
        update(kwargs["optimizer"], min(self.decay, (1 + updates) / (10 + updates)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model becomes the average, unless the best checkpoint's was loaded, which is one already."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            swap(kwargs["optimizer"])
        forget(kwargs["optimizer"])


@torch.no_grad()
def update(optimizer: Any, decay: float) -> None:
    """average <- decay x average + (1 - decay) x weight; the first average is the weight."""
    start(optimizer)
    pairs = [(slots[AVERAGE], weight) for weight, slots in _trained(optimizer) if slots]
    if pairs:
        averages, weights = zip(*pairs, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)


@torch.no_grad()
def start(optimizer: Any, *_: Any) -> None:
    """Put averages beside the moments. A hook of the optimiser's step, so that FSDP knows them when it loads them."""
    for weight, slots in _trained(optimizer):
        if slots and AVERAGE not in slots:
            slots[AVERAGE] = weight.clone()


@torch.no_grad()
def swap(optimizer: Any) -> None:
    """Let weights and averages change places; nothing happens where there are no averages."""
    for weight, slots in _trained(optimizer):
        if AVERAGE in slots:
            held = weight.clone()
            weight.copy_(slots[AVERAGE])
            slots[AVERAGE].copy_(held)


def forget(optimizer: Any) -> None:
    """Drop the averages."""
    for slots in optimizer.state.values():
        slots.pop(AVERAGE, None)


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Have the averages in the model within the block, where an optimiser keeps any."""
    if optimizer is not None:
        swap(optimizer)
    try:
        yield
    finally:
        if optimizer is not None:
            swap(optimizer)


def _trained(optimizer: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each weight with its slots in the optimiser's state, empty before the first update."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            yield weight.detach(), optimizer.state.get(weight, {})
