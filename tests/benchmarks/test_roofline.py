"""The model of a step's time on a GPU."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import CARDS, Card, step
from benchmarks.stock import our_model, stock_model


def test_with_infinite_memory_the_seconds_are_the_operations_of_torchs_own_counter() -> None:
    """At one rate for all types; forward and backward."""
    card = Card(bf16=1e9, tf32=1e9, memory=float("inf"), cache=float("inf"))
    model = our_model("tiny", 64, num_queries=8).model
    with FlopCounterMode(display=False) as counted, torch.autocast("cpu", torch.bfloat16):
        sum(output.sum() for output in model.train()(torch.zeros(1, 3, 64, 64))).backward()
    found = step(lambda: model, card, 1, 64)
    assert sum(found.seconds.values()) * 1e9 == pytest.approx(counted.get_total_flops())


def test_every_part_of_ours_and_stock_takes_time() -> None:
    for build in (lambda: our_model("tiny", 64).model, lambda: stock_model(our_model("tiny", 64)).model):
        seconds = step(build, CARDS["h100"], 1, 64).seconds
        assert all(seconds[part] > 0 for part in ("backbone and neck", "pixel decoder", "transformer decoder"))
