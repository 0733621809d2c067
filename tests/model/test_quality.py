"""The predicted IoU of each mask: how it is measured, learnt, and multiplied into the class probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from m2f_trainer.model.build import build_model
from m2f_trainer.model.compact_masks import CompactMasks
from m2f_trainer.model.mask2former import M2FModel, load_model
from m2f_trainer.model.quality import dilated, overlaps, seen_queries
from tests.model.tiny import CATEGORIES, HEAD, VIT, images, labels, tiny_model

PIXELS = torch.stack(torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij"))


def disc(y: float, x: float, radius: float) -> Tensor:
    """Pixels of a frame of 96 x 128."""
    return ((PIXELS[0] - y) ** 2 + (PIXELS[1] - x) ** 2 < radius**2).float()


def pycocotools_iou(first: Tensor, second: Tensor) -> float:
    encoded = [coco_mask.encode(np.asfortranarray(one.numpy().astype(np.uint8))) for one in (first, second)]
    return float(coco_mask.iou(encoded[:1], encoded[1:], [0])[0, 0])


def compact(masks: list[Tensor]) -> CompactMasks:
    """Each cropped to its box and a border, as batches come."""
    values, boxes, offsets = [], [], [0]
    for mask in masks:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = [int(columns[0]) - 1, int(rows[0]) - 1, int(columns[-1]) + 2, int(rows[-1]) + 2]
        part = F.pad(mask, (1, 1, 1, 1))[box[1] + 1 : box[3] + 1, box[0] + 1 : box[2] + 1]
        values.append(part.flatten().to(torch.uint8))
        boxes.append(box)
        offsets.append(offsets[-1] + part.numel())
    return CompactMasks(torch.cat(values), torch.tensor(boxes), torch.tensor(offsets[:-1]), (96, 128))


def test_the_measured_iou_is_pycocotools_at_the_frames_own_size() -> None:
    truth = [disc(40, 60, 20), disc(10, 12, 7), disc(90, 120, 15), disc(50, 50, 45)]
    ours = [disc(44, 66, 16), disc(11, 10, 9), disc(84, 121, 12), disc(50, 90, 12)]
    logits = F.avg_pool2d(torch.stack(ours), 4) - 0.5  # (4, 24, 32): of the centres' surroundings
    full = F.interpolate(logits[None], size=(96, 128), mode="bilinear", align_corners=False)[0] > 0
    found = overlaps(
        torch.eye(4), logits[None], compact(truth), torch.arange(4), [4]
    )  # mask m is the features' channel m
    expected = [pycocotools_iou(*pair) for pair in zip(full, truth, strict=True)]
    assert min(expected) < 0.2 < 0.6 < max(expected)
    np.testing.assert_allclose(found.numpy(), expected, atol=0.03)


@pytest.mark.parametrize("size", [(7, 5), (1, 9), (1, 1)])
def test_a_dilated_map_is_torchs_max_pool(size: tuple[int, int]) -> None:
    values = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dilated(values), F.max_pool2d(values, 3, stride=1, padding=1))


def test_a_mask_without_a_cell_and_one_far_away_have_iou_zero() -> None:
    features = torch.stack([torch.full((24, 32), -1.0), F.avg_pool2d(disc(90, 120, 5)[None], 4)[0] - 0.5])
    masks = compact([disc(10, 10, 6)])
    assert overlaps(torch.eye(2), features[None], masks, torch.tensor([0, 0]), [2]).tolist() == [0, 0]


def test_the_quality_loss_trains_the_quality_head_alone() -> None:
    model = tiny_model(quality_weight=2.0).train()
    torch.manual_seed(0)
    model(images(), **labels()).loss.backward()
    assert model.quality_predictor is not None
    assert all(one.grad is not None for one in model.quality_predictor.parameters())
    assert model.quality_predictor.score.weight.grad.abs().sum() > 0
    plain = tiny_model().train()
    for name, tensor in plain.state_dict().items():
        tensor.copy_(model.state_dict()[name])
    torch.manual_seed(0)
    plain(images(), **labels()).loss.backward()
    others = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, others[name].grad)


def test_training_predicts_the_iou_of_every_fourth_query_only() -> None:
    model, shapes = tiny_model(quality_weight=2.0), []
    assert model.quality_predictor is not None
    model.quality_predictor.register_forward_hook(lambda head, given, logits: shapes.append(given[0].shape[:2]))
    model.train()(images(), **labels())
    queries = model.eval()(images(), **labels()).class_queries_logits.shape[1]
    assert shapes == [(2, -(-queries // 4)), (2, queries)]


def test_the_quality_loss_of_every_fourth_query_is_scaled_to_all_queries() -> None:
    model = tiny_model(quality_weight=2.0)  # a new head predicts 0.5 for each mask: without objects all terms are equal
    nothing = {"mask_labels": [torch.zeros(0, 64, 64)] * 2, "class_labels": [torch.zeros(0, dtype=torch.int64)] * 2}
    with torch.no_grad():
        torch.testing.assert_close(model.train()(images(), **nothing).loss, model.eval()(images(), **nothing).loss)


def test_a_head_trained_on_two_images_predicts_the_ious_of_their_masks() -> None:
    model = tiny_model(quality_weight=1.0).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = model.quality_predictor
    assert head is not None
    head.requires_grad_(True)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    terms = []
    for _ in range(60):
        torch.manual_seed(3)
        hidden, embeddings, features = model.model(model.normalise(images(), None))
        mask_logits = torch.einsum("bqc,bchw->bqhw", embeddings[-1][:, seen_queries(training=True)], features)
        classes, quality = model.class_predictor(hidden), head(mask_logits, features)
        given = labels()
        masks = CompactMasks.from_dense(given["mask_labels"])
        found = model.criterion(embeddings, features, classes, masks, given["class_labels"], quality_logits=quality)
        terms.append(float(found["loss_quality"].detach()))
        optimizer.zero_grad()
        found["loss_quality"].sum().backward()
        optimizer.step()
    truth = torch.rand(())  # the loss of a prediction that equals the IoUs is their entropy: it can't fall below
    assert terms[-1] < 0.9 * terms[0], truth


def test_a_new_head_keeps_the_order_of_a_trained_models_predictions(tmp_path: Path) -> None:
    source = tiny_model()
    source.save_pretrained(tmp_path)
    model = build_model(
        VIT, CATEGORIES, image_size=(64, 64), init_from=str(tmp_path), **{**HEAD, "quality_weight": 1.0}
    )
    plain, ranked = predictions(source), predictions(model)
    torch.testing.assert_close(ranked, plain / 2)


def test_a_saved_quality_head_loads_with_equal_outputs(tmp_path: Path) -> None:
    model = tiny_model(quality_weight=1.0)
    assert model.quality_predictor is not None
    torch.nn.init.normal_(model.quality_predictor.score.weight)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(predictions(load_model(str(tmp_path))), predictions(model))


def predictions(model: M2FModel) -> Tensor:
    """Class probabilities (B, Q, K)."""
    with torch.no_grad():
        return model.eval()(images()).class_queries_logits.softmax(-1)[..., :-1]
