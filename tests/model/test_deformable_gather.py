"""Deformable attention without `grid_sample`, against the implementation with it."""

import torch

from m2f_trainer.model.deformable_gather import attend_gather
from m2f_trainer.model.deformable_grid import attend_grid

SHAPES = ((5, 7), (1, 9), (6, 2))


def test_gathered_samples_are_those_of_grid_sample_also_outside_and_on_the_edges() -> None:
    generator = torch.Generator().manual_seed(0)
    length, heads, points = sum(height * width for height, width in SHAPES), 2, 4
    value = torch.randn(3, length, heads, 8, generator=generator)
    sides = torch.tensor([[width, height] for height, width in SHAPES]).unsqueeze(1)
    places = torch.rand(3, length, heads, len(SHAPES), points, 2, generator=generator) * (sides + 8.0) - 4.5
    places[:, ::3] = places[:, ::3].round()  # on pixels, on the border, and exactly one pixel outside
    places[0, 0] = 1e9
    places[0, 1] = -1e9
    weights = torch.rand(places.shape[:-1], generator=generator)
    found = attend_gather(value, places, weights, SHAPES)
    torch.testing.assert_close(found, attend_grid(value, places, weights, SHAPES), rtol=1e-5, atol=1e-5)
