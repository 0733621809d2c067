"""The fast conversion of logits to Instances equals that of the original Mask2Former."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

from m2f_trainer.inference import postprocess
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.postprocess import to_instances
from tests.evaluation.reference import blob_logits, original_route

Size = tuple[int, int]
IDS = [5, 9, 70]
FRAMES: list[tuple[Size, Size, Size]] = [
    ((48, 64), (96, 128), (96, 128)),  # original, resized, padded: made larger, no padding
    ((97, 131), (94, 128), (128, 128)),  # odd sides
    ((480, 640), (192, 256), (256, 256)),  # made smaller
    ((300, 20), (256, 17), (256, 256)),  # far more padding than image
    ((700, 9), (128, 2), (128, 256)),
    ((1, 1), (4, 4), (128, 128)),
    ((61, 50), (61, 50), (64, 64)),  # kept
]


def class_logits(queries: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.normal(0, 2, (queries, len(IDS) + 1))).to(dtype)


def run(classes: Tensor, masks: Tensor, original: Size, resized: Size, padded: Size, top_k: int = 100) -> Instances:
    found = to_instances(
        classes[None],
        masks[None],
        image_ids=[3],
        original_sizes=[original],
        resized_sizes=[resized],
        padded_size=padded,
        category_ids=IDS,
        top_k=top_k,
    )
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("original", "resized", "padded"), FRAMES)
def test_masks_scores_and_classes_equal_two_interpolations(
    original: Size, resized: Size, padded: Size, dtype: torch.dtype
) -> None:
    masks = blob_logits(40, padded[0] // 4, padded[1] // 4, seed=original[0], dtype=dtype)
    classes = class_logits(40, seed=1, dtype=dtype)
    found = run(classes, masks, original, resized, padded)
    expected_classes, _, scores, logits = original_route(classes, masks, original, resized, padded)
    order = torch.argsort(-scores, stable=True)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert found.scores == pytest.approx(scores[order].double().numpy(), abs=tolerance)
    assert found.image_id == 3
    assert found.size == original
    scored = int((found.scores > 0).sum())
    ids = np.array(IDS)[expected_classes[order].numpy()]
    assert found.category_ids[:scored].tolist() == ids[:scored].tolist()
    for index, position in enumerate(order[:scored]):
        differing = found.mask(index).astype(bool) != (logits[position] > 0).numpy()
        # A pixel may differ only where the logit is zero up to rounding.
        assert logits[position].abs().numpy()[differing].max(initial=0) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_the_operator_of_an_axis_is_two_interpolations_in_float64() -> None:
    for logits, padded, resized, original in [(32, 128, 100, 333), (32, 128, 128, 17), (7, 28, 1, 5), (64, 64, 50, 80)]:
        axis = postprocess.axis_operator(logits, padded, resized, original)
        dense = np.zeros((original, logits))
        np.add.at(dense, (np.arange(original)[:, None], axis.index), axis.weight)
        eye = torch.eye(logits, dtype=torch.float64)[None]
        step = functional.interpolate(eye, padded, mode="linear", align_corners=False)[:, :, :resized]
        plain = functional.interpolate(step, original, mode="linear", align_corners=False)[0].T.numpy()
        assert dense == pytest.approx(plain, abs=1e-12)


def test_many_masks_at_once_as_on_an_accelerator_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, classes = blob_logits(30, 32, 32, seed=2), class_logits(30, 3, torch.float32)
    alone = run(classes, masks, (97, 131), (94, 128), (128, 128))
    groups = postprocess._groups
    monkeypatch.setattr(postprocess, "_groups", lambda boxes, size: groups(boxes, 5))
    together = run(classes, masks, (97, 131), (94, 128), (128, 128))
    assert together.rles == alone.rles
    assert together.scores == pytest.approx(alone.scores, abs=1e-7)
    assert (together.boxes == alone.boxes).all()


@pytest.mark.parametrize("limit", [1, 500, 3000])
def test_rendering_in_strips_gives_the_same(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    masks, classes = blob_logits(20, 32, 32, seed=2), class_logits(20, 3, torch.float32)
    masks[0, :, 5:20] = 3  # as high as the image, so that its runs cross the strips
    masks[1] = 3
    whole = run(classes, masks, (97, 131), (94, 128), (128, 128))
    monkeypatch.setattr(postprocess, "PIXELS_AT_ONCE", {"cpu": limit})
    strips = run(classes, masks, (97, 131), (94, 128), (128, 128))
    assert strips.rles == whole.rles
    assert strips.scores == pytest.approx(whole.scores, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_masks_as_the_cpu() -> None:
    masks, classes = blob_logits(60, 64, 64, seed=4, dtype=torch.float64), class_logits(60, 5, torch.float64)
    host = run(classes, masks, (300, 400), (192, 256), (256, 256))
    device = run(classes.cuda(), masks.cuda(), (300, 400), (192, 256), (256, 256))
    assert device.rles == host.rles
    assert device.scores == pytest.approx(host.scores, abs=1e-12)


def test_run_lengths_are_encoded_byte_for_byte_as_pycocotools_does() -> None:
    generator = np.random.default_rng(0)
    shapes = [(1, 1), (1, 9), (9, 1), (7, 5), (40, 60), (700, 300)]
    masks = [(generator.random(shape) < density) for shape in shapes for density in (0, 0.01, 0.5, 0.99, 1)]
    runs = []
    for mask in masks:
        flat = np.concatenate([[False], mask.T.ravel()])
        runs.append(postprocess.runs_of_changes(np.flatnonzero(flat[1:] != flat[:-1]), mask.size))
    expected = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] for mask in masks]
    assert postprocess.encode_runs(runs) == expected
    assert postprocess.encode_runs([]) == []


@pytest.mark.parametrize("rows", [slice(0, 16), slice(0, 8), slice(8, 16), slice(4, 12)])
def test_masks_that_touch_the_edges_are_encoded_as_pycocotools_does(rows: slice) -> None:
    masks = torch.full((1, 16, 16), -5.0)
    masks[0, rows, 3:9] = 5
    found = run(torch.tensor([[9.0, 0, 0, 0]]), masks, (70, 50), (64, 46), (64, 64), top_k=1)
    logits = original_route(torch.tensor([[9.0, 0, 0, 0]]), masks, (70, 50), (64, 46), (64, 64), top_k=1)[3][0]
    expected = coco_mask.encode(np.asfortranarray((logits > 0).numpy().astype(np.uint8)))
    assert found.rles == [expected]
    assert found.boxes.tolist() == [coco_mask.toBbox(expected).tolist()]


def test_a_mask_without_a_pixel_scores_zero_and_is_dropped_by_a_threshold_of_zero() -> None:
    masks = torch.full((4, 8, 8), -1.0)
    masks[0, 2:4, 2:4] = 1
    masks[1, :, 6:] = 1  # in the padding alone
    found = run(torch.zeros(4, 4), masks, (32, 20), (32, 20), (32, 32), top_k=12)
    assert len(found) == 12
    assert (found.scores > 0).sum() == 3
    assert found.boxes[3:].tolist() == [[0, 0, 0, 0]] * 9
    assert found.mask(11).sum() == 0
    assert len(found.above(0.0)) == 3


def test_a_batch_of_images_of_different_sizes_equals_one_by_one() -> None:
    masks = torch.stack([blob_logits(20, 32, 32, seed=seed) for seed in (1, 2)])
    classes = torch.stack([class_logits(20, seed, torch.float32) for seed in (3, 4)])
    sizes, resized = torch.tensor([[60, 90], [200, 110]]), torch.tensor([[85, 128], [128, 70]])
    batch = to_instances(
        classes,
        masks,
        image_ids=torch.tensor([8, 7]),
        original_sizes=sizes,
        resized_sizes=resized,
        padded_size=(128, 128),
        category_ids=IDS,
    )
    assert [item.image_id for item in batch] == [8, 7]
    for index, item in enumerate(batch):
        height, width = sizes[index].tolist()
        one = run(classes[index], masks[index], (height, width), tuple(resized[index].tolist()), (128, 128))
        assert item.rles == one.rles
        assert (item.scores == one.scores).all()


def test_no_images_give_no_instances() -> None:
    empty = to_instances(
        torch.zeros(0, 5, 4),
        torch.zeros(0, 5, 8, 8),
        image_ids=[],
        original_sizes=[],
        resized_sizes=[],
        padded_size=(32, 32),
        category_ids=IDS,
    )
    assert empty == []


def test_more_pairs_asked_for_than_there_are_gives_all_of_them() -> None:
    assert len(run(torch.zeros(2, 4), torch.ones(2, 8, 8), (32, 32), (32, 32), (32, 32))) == 6


def test_logits_that_are_not_numbers_score_zero() -> None:
    masks = torch.full((3, 8, 8), float("nan"))
    found = run(torch.full((3, 4), float("nan")), masks, (32, 32), (32, 32), (32, 32))
    assert (found.scores == 0).all()


def test_half_precision_logits_are_read_as_the_numbers_they_are() -> None:
    masks, classes = blob_logits(10, 16, 16, seed=1).bfloat16(), class_logits(10, 2, torch.bfloat16)
    half = run(classes, masks, (80, 64), (64, 51), (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        full = run(classes.float(), masks.float(), (80, 64), (64, 51), (64, 64))
    assert half.rles == full.rles
    assert (half.scores == full.scores).all()


def test_real_model_outputs_give_the_same_as_the_plain_route() -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=3,
        num_queries=12,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 96))
    classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
    found = run(classes, masks, (100, 120), (64, 77), (64, 96))
    _, _, scores, logits = original_route(classes, masks, (100, 120), (64, 77), (64, 96))
    assert found.scores == pytest.approx(np.sort(scores.numpy())[::-1], abs=1e-6)
    total = sum(float(coco_mask.area(rle)) for rle in found.rles)
    assert total == pytest.approx(float((logits > 0).sum()), abs=3)
