"""What is measured of each image and object. (Every kind of finding is planted in test_examine.py.)"""

from __future__ import annotations

import pytest
from pycocotools import mask as coco_mask

from m2f_trainer.data.formats import find_splits, read_split
from m2f_trainer.data.problems import Findings
from m2f_trainer.doctor.scan import Scan, Settings, boxes_agree, check_input, instances_of_samples, scan_split
from tests.data.folders import SQUARE, annotation, content, write


def scanned(folder, settings: Settings, *annotations: dict[str, object]) -> tuple[list[Scan], Findings]:
    (files,) = find_splits(str(write(folder, content(*annotations)))).splits
    report = Findings()
    scans = scan_split(read_split(files, report), report)
    check_input(scans, settings, report)
    return scans, report


def test_box_and_area_are_measured_from_the_mask_as_pycocotools_does(tmp_path):
    (scan,), _ = scanned(tmp_path, Settings(64, 64), annotation(area=500, bbox=[0, 0, 20, 16]))
    (one,) = scan.objects
    rle = coco_mask.merge(coco_mask.frPyObjects(SQUARE, 16, 20))
    assert (one["mask_area"], one["mask_box"]) == (coco_mask.area(rle), coco_mask.toBbox(rle).tolist())
    assert one["findings"] == ["box-mismatch", "area-mismatch"]
    assert scan.row()["objects"] == scan.objects


def test_crowd_regions_are_no_targets_and_need_no_query(tmp_path):
    (scan,), report = scanned(tmp_path, Settings(64, 64, num_queries=1), annotation(), annotation(2, iscrowd=1))
    assert [one["id"] for one in scan.targets] == [1]
    assert len(scan.objects) == 2
    assert report.sorted() == []


@pytest.mark.parametrize(("side", "kinds"), [(9, ["tiny-object"]), (10, [])])  # 3.5 and 4 pixels high
def test_an_object_below_one_cell_of_the_masks_is_tiny_at_the_models_input_size(tmp_path, side, kinds):
    _, report = scanned(tmp_path, Settings(side, side), annotation())
    assert [one.kind for one in report.sorted()] == kinds


def test_boxes_agree_within_three_pixels_and_a_tenth_of_the_larger_side():
    assert boxes_agree([10, 10, 50, 50], [2, 10, 58, 50])  # 8 of 3 + 5.8
    assert not boxes_agree([10, 10, 50, 50], [1, 10, 59, 50])  # 9 of 3 + 5.9
    assert not boxes_agree([10, 10, 50, 50], [10, 10, 50, 60])  # 10 of 3 + 6


def test_objects_are_counted_and_measured_in_the_tiles_of_the_model(tmp_path):
    """Tiles of 10 pixels over 20 x 16: an object of 10 x 7 pixels in the middle reaches into all four."""
    corner = [[0, 0, 3, 0, 3, 3, 0, 3]]
    entries = (annotation(), annotation(2, segmentation=corner, bbox=[0, 0, 3, 3], area=9))
    (scan,), report = scanned(tmp_path, Settings(10, 10, num_queries=1, tile_size=10), *entries)
    assert instances_of_samples(scan, Settings(tile_size=10)).tolist() == [2, 1, 1, 1]
    assert instances_of_samples(scan, Settings()).tolist() == [2]
    found = {one.kind: one for one in report.sorted()}
    assert set(found) == {"many-instances", "tiny-object"}
    assert "2 instances in a tile of 10 pixels, but the model has 1 queries." in found["many-instances"].message
    assert found["tiny-object"].ids == [2]
    assert "3x3 pixels, 3.0x3.0 at tiles of 10 pixels at 10x10." in found["tiny-object"].message
    check_input([scan], Settings(20, 20, num_queries=2, tile_size=10), again := Findings())
    assert again.sorted() == []
