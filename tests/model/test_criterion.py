"""The loss beyond its equality with transformers' (test_transformers_parity.py)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from m2f_trainer.model import compact_masks
from m2f_trainer.model.backbones import ModelError
from m2f_trainer.model.compact_masks import CompactMasks
from m2f_trainer.model.criterion import Criterion, LossSettings, PointLosses, Points, normalizer
from m2f_trainer.model.matcher import Matches
from tests.model.tiny import images, labels, tiny_model

SETTINGS = LossSettings(num_points=32)


def inputs(counts: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random outputs of 2 levels and 4 queries, and `counts` targets an image."""
    torch.manual_seed(0)
    size = len(counts)
    return {
        "embeddings": torch.randn(2, size, 4, 8, dtype=dtype, requires_grad=True),
        "features": torch.randn(size, 8, 6, 7, dtype=dtype, requires_grad=True),
        "class_logits": torch.randn(2, size, 4, 4, dtype=dtype, requires_grad=True),
        "masks": CompactMasks.from_dense([torch.rand(count, 24, 28) > 0.5 for count in counts]),
        "class_labels": [torch.arange(count) % 3 for count in counts],
    }


@pytest.mark.parametrize("no_object_weight", [0.1, 0.0])
@pytest.mark.parametrize("counts", [[0, 0], [0, 3], [9], [4, 0, 9]], ids=str)
def test_any_number_of_objects_gives_finite_terms_and_gradients_everywhere(
    counts: list[int], no_object_weight: float
) -> None:
    given = inputs(counts)
    terms = Criterion(3, replace(SETTINGS, no_object_weight=no_object_weight))(**given)
    assert all(term.shape == (2,) and term.isfinite().all() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    for name in ("embeddings", "features", "class_logits"):
        assert given[name].grad.isfinite().all()
    if not any(counts):
        assert terms["loss_mask"].eq(0).all()
        assert terms["loss_dice"].eq(0).all()


def test_the_terms_are_float32_under_autocast_and_equal_those_without() -> None:
    given = inputs([3, 2])
    points = Points(torch.rand(2, 32, 2), torch.rand(10, 96, 2), torch.rand(10, 8, 2))
    expected = Criterion(3, SETTINGS)(**given, points=points)
    with torch.autocast("cpu", torch.bfloat16):
        terms = Criterion(3, SETTINGS)(**given, points=points)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, expected[name])


def test_bfloat16_outputs_give_float32_terms() -> None:
    given = inputs([2])
    for name in ("embeddings", "features", "class_logits"):
        given[name] = given[name].bfloat16()
    assert all(term.dtype == torch.float32 for term in Criterion(3, SETTINGS)(**given).values())


def test_point_losses_have_the_gradients_of_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs([3, 2], torch.float64)
    monkeypatch.setitem(compact_masks.VALUES_AT_ONCE, "cpu", 200)  # several chunks per image
    target = torch.tensor([0, 1, 2, 3, 4])
    matches = Matches(torch.zeros(5).long(), torch.tensor([0, 0, 0, 1, 1]), target, target, [3, 2])
    points = Points(
        torch.rand(2, 32, 2), torch.rand(5, 96, 2, dtype=torch.float64), torch.rand(5, 8, 2, dtype=torch.float64)
    )

    def losses(pairs: Tensor, features: Tensor) -> Any:
        return PointLosses.apply(pairs, features, given["masks"], matches, SETTINGS, points)

    pairs = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses, (pairs, given["features"]))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (0, 3, 1, 2), (1, 0, 2, 3)])
def test_the_gradient_does_not_depend_on_how_the_features_lie_in_memory(order: tuple[int, ...]) -> None:
    given = inputs([3, 2])
    back = [order.index(axis) for axis in range(4)]
    points = Points(torch.rand(2, 32, 2), torch.rand(10, 96, 2), torch.rand(10, 8, 2))
    gradients = []
    for features in (given["features"], given["features"].detach().permute(order).contiguous().permute(back)):
        leaf = features.detach().requires_grad_()
        terms = Criterion(3, SETTINGS)(**{**given, "features": leaf}, points=points)
        (terms["loss_mask"] + terms["loss_dice"]).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_loss_keeps_no_mask_of_the_frames_size() -> None:
    """Neither a dense target nor the logits of a matched pair: what is kept follows the points."""
    torch.manual_seed(0)
    side, objects = 128, 20
    masks = CompactMasks.from_dense([torch.rand(objects, side, side) > 0.5])
    features = torch.randn(1, 4, side, side, requires_grad=True)
    embeddings = torch.randn(3, 1, objects, 4, requires_grad=True)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        Criterion(3, LossSettings(num_points=512))(
            embeddings, features, torch.randn(3, 1, objects, 4), masks, [torch.zeros(objects, dtype=torch.long)]
        )
    assert max(kept) == features.numel()
    assert sum(kept) < features.numel() + 3.2 * (3 * objects * 512)  # x, y and the probability there


def test_the_same_seed_gives_the_same_loss() -> None:
    model, batch = tiny_model().train(), {"pixel_values": images(), **labels()}
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(model(**batch).loss)
    assert torch.equal(*losses)


def test_the_divisor_of_the_class_loss_is_the_weight_of_its_queries() -> None:
    labels = [torch.tensor([0, 1, 1]), torch.tensor([], dtype=torch.int64)]
    assert normalizer(labels, 4, 0.1).tolist() == pytest.approx([3, 3 + 0.5])
    assert normalizer(labels, 4, 0.1, (2.0, 5.0)).tolist() == pytest.approx([3, 12 + 0.5])
    assert normalizer(labels, 2, 0.1, (2.0, 5.0)).tolist() == pytest.approx([3, 8 + 0.2]), "two of mean weight 4"


def test_class_weights_need_one_number_a_class() -> None:
    assert tiny_model(class_weights=[2.0, 1.0]).criterion.settings.class_weights == (2.0, 1.0)
    with pytest.raises(ModelError, match="class_weights: expected 2 numbers, one a class, got 3"):
        tiny_model(class_weights=[2.0, 1.0, 1.0])
