"""Measurements of each image and object. (Every kind of finding is planted in test_examine.py.)"""

from __future__ import annotations

from pycocotools import mask as coco_mask

from m2f_trainer.data.formats import find_splits, read_split
from m2f_trainer.data.problems import Findings
from m2f_trainer.doctor.scan import Scan, boxes_agree, scan_split
from tests.data.folders import SQUARE, annotation, content, write


def scanned(folder, *annotations: dict[str, object]) -> tuple[list[Scan], Findings]:
    (files,) = find_splits(str(write(folder, content(*annotations)))).splits
    report = Findings()
    return scan_split(read_split(files, report), report), report


def test_box_and_area_are_measured_from_the_mask_as_pycocotools_does(tmp_path):
    (scan,), _ = scanned(tmp_path, annotation(area=500, bbox=[0, 0, 20, 16]))
    (one,) = scan.objects
    rle = coco_mask.merge(coco_mask.frPyObjects(SQUARE, 16, 20))
    assert (one["mask_area"], one["mask_box"]) == (coco_mask.area(rle), coco_mask.toBbox(rle).tolist())
    assert one["findings"] == ["box-mismatch", "area-mismatch"]
    assert scan.row()["objects"] == scan.objects


def test_crowd_regions_are_no_targets(tmp_path):
    (scan,), report = scanned(tmp_path, annotation(), annotation(2, iscrowd=1))
    assert [one["id"] for one in scan.targets] == [1]
    assert len(scan.objects) == 2
    assert report.sorted() == []


def test_boxes_agree_within_three_pixels_and_a_tenth_of_the_larger_side():
    assert boxes_agree([10, 10, 50, 50], [2, 10, 58, 50])  # 8 of 3 + 5.8
    assert not boxes_agree([10, 10, 50, 50], [1, 10, 59, 50])  # 9 of 3 + 5.9
    assert not boxes_agree([10, 10, 50, 50], [10, 10, 50, 60])  # 10 of 3 + 6
