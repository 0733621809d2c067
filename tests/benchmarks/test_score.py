from pathlib import Path
from typing import Any

import pytest
from pycocotools import mask as coco_mask

from benchmarks.rivals.score import score
from tests.benchmarks.dataset import square, write_squares


def result(entry: dict[str, Any], score: float) -> dict[str, Any]:
    rle = coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], 128, 128))
    mask = {"size": [128, 128], "counts": rle["counts"].decode()}
    fields = {name: entry[name] for name in ("image_id", "category_id")}
    return {**fields, "score": score, "segmentation": mask}


def annotations(folder: Path, objects: list[dict[str, Any]]) -> Path:
    return write_squares(folder / "squares", objects) / "valid" / "_annotations.coco.json"


def test_the_truth_scores_one_and_absent_sizes_minus_one(tmp_path: Path) -> None:
    objects = [square(1, 0, 0), square(2, 40, 40)]
    figures = score(annotations(tmp_path, objects), [result(one, 0.5) for one in objects])
    assert figures["AP"] == pytest.approx(1)
    assert figures["small"] == pytest.approx(1)
    assert figures["large"] == -1


def test_nothing_found_scores_zero(tmp_path: Path) -> None:
    assert score(annotations(tmp_path, [square(1, 0, 0)]), [])["AP"] == 0


def test_half_of_the_objects_found_scores_about_one_half(tmp_path: Path) -> None:
    objects = [square(1, 20 * k, 0) for k in range(4)]
    figures = score(annotations(tmp_path, objects), [result(one, 0.5) for one in objects[:2]])
    assert figures["AP"] == pytest.approx(51 / 101)  # recalls 0, 0.01, ... 0.5 of pycocotools' 101


def test_only_the_best_hundred_results_of_an_image_count(tmp_path: Path) -> None:
    objects = [square(1, 0, 0), square(2, 40, 40)]
    false = [result(square(1, k, 60), 0.9) for k in range(100)]
    found = score(annotations(tmp_path, objects), [*false, result(objects[0], 0.1), result(objects[1], 1.0)])
    assert found["AP"] == pytest.approx(51 / 101)
