"""Instances: COCO results and back, and other forms."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from m2f_trainer.errors import MaskError
from m2f_trainer.inference.instances import Instances, tight_boxes


def test_results_entries_make_the_same_instances_again() -> None:
    masks = [np.asfortranarray(np.random.default_rng(seed).random((80, 64)) < 0.3, np.uint8) for seed in range(3)]
    rles = [coco_mask.encode(mask) for mask in masks]
    found = Instances(5, np.array([3, 1, 3]), np.array([0.9, 0.5, 0.1]), rles, tight_boxes(rles), (80, 64))
    entries = found.to_coco()
    assert set(entries[0]) == {"image_id", "category_id", "segmentation", "score"}
    assert isinstance(entries[0]["segmentation"]["counts"], str)
    (again,) = Instances.from_coco(reversed(entries))
    assert again.to_coco() == entries
    assert (again.boxes == found.boxes).all()
    assert all(np.array_equal(again.mask(index), mask) for index, mask in enumerate(masks))


def test_results_entries_of_two_sizes_for_one_image_are_an_error() -> None:
    entries = [
        {"image_id": 4, "category_id": 1, "score": 0.5, "segmentation": {"size": [height, 2], "counts": counts}}
        for height, counts in ((1, "2"), (2, "4"))
    ]
    with pytest.raises(MaskError, match=r"image_id 4 to have one mask size, found \[\(1, 2\), \(2, 2\)\]"):
        Instances.from_coco(entries)


def test_run_lengths_that_do_not_fill_the_image_are_an_error() -> None:
    entry = {"image_id": 4, "category_id": 1, "score": 0.5, "segmentation": {"size": [9, 9], "counts": "2"}}
    with pytest.raises(MaskError, match="image_id 4"):
        Instances.from_coco([entry])


def test_instances_become_supervisions_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    stand_in = ModuleType("supervision")
    stand_in.__spec__ = ModuleSpec("supervision", None)
    stand_in.Detections = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    mask = np.zeros((6, 8), np.uint8, order="F")
    mask[1:4, 2:7] = 1
    rles = [coco_mask.encode(mask)]
    found = Instances(1, np.array([17]), np.array([0.75]), rles, tight_boxes(rles), (6, 8))
    detections = found.to_supervision({17: "dog"})
    assert detections["xyxy"].tolist() == [[2, 1, 7, 4]]
    assert detections["mask"].shape == (1, 6, 8)
    assert np.array_equal(detections["mask"][0], mask.astype(bool))
    assert (detections["confidence"].tolist(), detections["class_id"].tolist()) == ([0.75], [17])
    assert detections["data"]["class_name"].tolist() == ["dog"]
