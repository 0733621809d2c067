"""Instance discrimination against its formula, written out point by point."""

import math

import pytest
import torch

from m2f_trainer.model.compact_masks import CompactMasks
from m2f_trainer.model.criterion import Criterion, LossSettings
from m2f_trainer.model.discrimination import TEMPERATURE, discrimination
from m2f_trainer.model.points import random_points, sample_features

SIDE = 8


def every_pixel(batch: int) -> torch.Tensor:
    """The centres of all pixels of a (SIDE, SIDE) frame, (B, P, 2)."""
    centres = (torch.arange(SIDE) + 0.5) / SIDE
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], -1).view(1, -1, 2).expand(batch, -1, -1)


def loss_at(features: torch.Tensor, masks: CompactMasks, counts: list[int], points: torch.Tensor) -> torch.Tensor:
    """The loss of maps (B, C, h, w) and their masks at points (B, P, 2)."""
    return discrimination(sample_features(features, points), masks.sample_images(counts, points))


def boxes(*places: tuple[int, int, int, int]) -> torch.Tensor:
    """One mask a box (x0, y0, x1, y1), (N, SIDE, SIDE)."""
    masks = torch.zeros(len(places), SIDE, SIDE)
    for mask, (x0, y0, x1, y1) in zip(masks, places, strict=True):
        mask[y0:y1, x0:x1] = 1
    return masks


def by_hand(features: torch.Tensor, masks: torch.Tensor) -> float:
    """The sum over the objects of one image, the background among them: features (C, h, w), masks (N, h, w)."""
    groups = [mask > 0 for mask in masks] + [masks.sum(0) == 0]
    unit = features / features.norm(dim=0, keepdim=True)
    means = [unit[:, group].mean(1) for group in groups if group.any()]
    means = [mean / mean.norm() for mean in means]
    total = 0.0
    for number, group in enumerate(group for group in groups if group.any()):
        losses = []
        for pixel in unit[:, group].T:
            weights = [math.exp(float(mean @ pixel) / TEMPERATURE) for mean in means]
            losses.append(-math.log(weights[number] / sum(weights)))
        total += sum(losses) / len(losses)
    return total


def test_the_loss_is_the_papers_formula_with_the_background_as_an_object() -> None:
    features = torch.randn(2, 5, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = boxes((0, 0, 3, 3), (4, 4, 8, 7)), boxes((1, 1, 2, 6))
    masks = CompactMasks.from_dense([first, second])
    found = loss_at(features, masks, [2, 1], every_pixel(2).double())
    assert float(found) == pytest.approx(by_hand(features[0], first) + by_hand(features[1], second))


def test_an_image_that_one_object_fills_has_no_background_and_an_empty_one_no_loss() -> None:
    features = torch.randn(2, 5, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = boxes((0, 0, SIDE, SIDE))
    masks = CompactMasks.from_dense([full, full[:0]])
    assert float(loss_at(features, masks, [1, 0], every_pixel(2).double())) == pytest.approx(0)


def test_a_point_of_two_objects_belongs_to_the_smaller_one_as_a_window_in_a_facade() -> None:
    features = torch.randn(1, 5, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    facade, window, pane, beside = boxes((0, 0, 7, 8), (1, 1, 5, 6), (2, 2, 4, 4), (4, 5, 8, 7))
    masks = CompactMasks.from_dense([torch.stack([window, facade, pane, beside])])
    apart = torch.stack([
        facade * (1 - window) * (1 - beside), window * (1 - pane) * (1 - beside), pane, beside
    ])  # fmt: skip
    found = loss_at(features, masks, [4], every_pixel(1).double())
    assert float(found) == pytest.approx(by_hand(features[0], apart))


def test_an_object_that_smaller_ones_cover_completely_has_no_loss() -> None:
    features = torch.randn(1, 5, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = boxes((0, 0, 4, 6), (4, 0, 8, 6))
    hidden, alone = (CompactMasks.from_dense([some]) for some in (torch.cat([boxes((0, 0, 8, 6)), halves]), halves))
    everywhere = every_pixel(1).double()
    found, expected = loss_at(features, hidden, [3], everywhere), loss_at(features, alone, [2], everywhere)
    assert float(found) == pytest.approx(float(expected))


def test_it_pulls_an_objects_pixels_together_and_touching_objects_apart() -> None:
    features = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    two = boxes((0, 0, 4, SIDE), (4, 0, SIDE, SIDE))
    masks, optimizer = CompactMasks.from_dense([two]), torch.optim.Adam([features], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss_at(features, masks, [2], every_pixel(1)).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(features.detach()[0], dim=0)
    left, right = unit[:, :, :4].flatten(1), unit[:, :, 4:].flatten(1)
    assert float((left.mean(1) @ left).min()) > float((left.mean(1) @ right).max()) + TEMPERATURE
    assert float((right.mean(1) @ right).min()) > float((right.mean(1) @ left).max()) + TEMPERATURE


def test_the_criterion_adds_the_term_by_its_weight_and_the_number_of_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, features = (
        torch.randn(2, 1, 3, 4, generator=generator),
        torch.randn(1, 4, SIDE, SIDE, generator=generator),
    )
    logits, labels = torch.randn(2, 1, 3, 2, generator=generator), [torch.tensor([0, 0])]
    masks = CompactMasks.from_dense([boxes((0, 0, 3, 3), (4, 4, 8, 7))])
    terms = []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        criterion = Criterion(1, LossSettings(num_points=64, discrimination_weight=weight))
        terms.append(criterion(embeddings, features, logits, masks, labels))
    off, on = terms
    assert "loss_discrimination" not in off
    assert all(torch.equal(off[name], on[name]) for name in off)
    torch.manual_seed(0)
    alone = loss_at(features, masks, [2], random_points(1, 64, features))
    assert float(on["loss_discrimination"]) == pytest.approx(3 * float(alone) / 2)
