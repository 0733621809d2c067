"""Points of the losses: torch's grid_sample is the truth."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_trainer.model.points import sample_features


def places() -> Tensor:
    """Random points of two images, and those at corners, edges and cell centres of maps of 5 x 7 cells."""
    torch.manual_seed(0)
    special = [[0, 0], [1, 1], [0, 1], [0.5, 0], [1, 0.5], [0.5 / 7, 0.5 / 5], [6.5 / 7, 4.5 / 5], [1 / 7, 1 / 5]]
    one = torch.tensor(special, dtype=torch.float64)
    return torch.cat([torch.rand(2, 40, 2, dtype=torch.float64), one.expand(2, -1, -1)], dim=1)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_values_and_gradients_are_those_of_grid_sample(memory: torch.memory_format) -> None:
    points = places()
    features = torch.randn(2, 3, 5, 7, dtype=torch.float64).to(memory_format=memory).requires_grad_()
    weights = torch.randn(2, 3, 48, dtype=torch.float64)
    found = sample_features(features, points)
    wanted = F.grid_sample(features, 2 * points.unsqueeze(2) - 1, align_corners=False).squeeze(3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    (gradient,) = torch.autograd.grad((found * weights).sum(), features)
    (expected,) = torch.autograd.grad((wanted * weights).sum(), features)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
