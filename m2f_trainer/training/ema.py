"""An exponential moving average (EMA) of the weights, which is evaluated, saved and kept as the final model.

The average of each trained weight is stored in the optimizer's state beside its moments, so it is sharded, saved and
restored bit-exactly as they are. While a model is evaluated or saved, weights and averages are swapped: the model of a
checkpoint is the averaged one, and its optimizer state holds the raw weights from which training continues.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGE = "average"


class Average(TrainerCallback):
    """Keeps an exponential moving average of the trained weights; LoRA factors are averaged as factors.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage, so the
    initial weights lose their influence quickly.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a resume the model holds the averages: swap them with the raw weights."""
        swap_averages(kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the average with the new weights."""
        updates = state.global_step + 1
        update_averages(kwargs["optimizer"], min(self.decay, (1 + updates) / (10 + updates)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the averages into the model, unless the best checkpoint was loaded: its model is averaged already."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            swap_averages(kwargs["optimizer"])
        drop_averages(kwargs["optimizer"])


@torch.no_grad()
def update_averages(optimizer: Optimizer, decay: float) -> None:
    """average <- decay x average + (1 - decay) x weight; the first average is the weight."""
    add_averages(optimizer)
    pairs = [(slots[AVERAGE], weight) for weight, slots in _trained(optimizer) if slots]
    if pairs:
        averages, weights = zip(*pairs, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)


@torch.no_grad()
def add_averages(optimizer: Optimizer, *_: Any) -> None:
    """Add averages to the optimizer's state. A hook of its step, so that FSDP expects them when it loads a state."""
    for weight, slots in _trained(optimizer):
        if slots and AVERAGE not in slots:
            slots[AVERAGE] = weight.clone()


@torch.no_grad()
def swap_averages(optimizer: Optimizer) -> None:
    """Swap weights and averages, where there are any."""
    for weight, slots in _trained(optimizer):
        if AVERAGE in slots:
            held = weight.clone()
            weight.copy_(slots[AVERAGE])
            slots[AVERAGE].copy_(held)


def drop_averages(optimizer: Optimizer) -> None:
    """Drop the averages."""
    for slots in optimizer.state.values():
        slots.pop(AVERAGE, None)


@contextmanager
def averaged(optimizer: Optimizer | None) -> Iterator[None]:
    """Context manager in which the model has the averaged weights, if the optimizer keeps averages."""
    if optimizer is not None:
        swap_averages(optimizer)
    try:
        yield
    finally:
        if optimizer is not None:
            swap_averages(optimizer)


def _trained(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Each weight with its entries in the optimizer's state, which are empty before the first update."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            yield weight.detach(), optimizer.state.get(weight, {})
