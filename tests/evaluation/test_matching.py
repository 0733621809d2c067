"""Matching and AP equal those of pycocotools and faster-coco-eval."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.evaluation.coco import CocoMap
from m2f_trainer.evaluation.matching import (
    average_precisions,
    concatenate_matches,
    match_image,
    mean_of_present,
    precisions,
)
from m2f_trainer.evaluation.overlaps import image_overlaps
from m2f_trainer.inference.instances import Instances
from m2f_trainer.masks.segmentation import decode
from tests.evaluation.truth import REAL_DATA, categories_in, instances_from, real_annotations, rows_of, synthetic

KEYS = ("boundary_map", "boundary_map_50", "boundary_map_75")


SIZES = ("boundary_map_small", "boundary_map_medium", "boundary_map_large")


def computed_figures(coco: CocoMap, predictions: list[Instances]) -> dict[str, float]:
    names = coco.class_names()
    matches = (match_image(image, len(names), "boundaries") for image in image_overlaps(coco, predictions))
    return average_precisions(concatenate_matches(matches, len(names)), names, "boundary_")


def reference_figures(coco: dict[str, Any], predictions: list[Instances]) -> list[float]:
    """Boundary AP, AP50, AP75, small, medium and large as computed by faster-coco-eval."""
    engine = pytest.importorskip("faster_coco_eval")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = engine.COCO(copy.deepcopy(coco))
        known = {category["id"] for category in coco["categories"]}
        results = [entry for item in predictions for entry in item.to_coco() if entry["category_id"] in known]
        found = truth.loadRes(results)
        scorer = engine.COCOeval_faster(truth, found, "boundary", print_function=lambda *_: None)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return [float(value) for value in scorer.stats[:6]]


def moved(rows: Any, seed: int) -> list[Instances]:
    """Every object and crowd region, shifted by a few pixels, with random scores; some of another class, some twice."""
    generator, found = np.random.default_rng(seed), []
    for row in rows:
        size, entries = (row["height"], row["width"]), []
        ids = [item["category_id"] for item in row["objects"]]
        for item in row["objects"]:
            mask = decode(item["counts"], *size)
            for _ in range(int(generator.integers(1, 3))):
                shift = generator.integers(-2, 3, 2).tolist()
                rle = coco_mask.encode(np.asfortranarray(np.roll(mask, shift, (0, 1))))
                guess = item["category_id"] if generator.random() < 0.9 else int(generator.choice(ids))
                entries.append((guess, round(float(generator.random()), 2), rle["counts"]))
        found.append(instances_from(row["image_id"], size, entries))
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_boundary_ap_equals_faster_coco_evals_on_blobs(seed: int) -> None:
    coco, predictions = synthetic(40, seed=seed)
    coco["annotations"] = [item | {"id": number} for number, item in enumerate(coco["annotations"], 1)]
    figures = computed_figures(CocoMap(rows_of(coco), categories_in(coco)), predictions)
    assert [figures[key] for key in KEYS + SIZES] == pytest.approx(reference_figures(coco, predictions), abs=1e-9)
    assert 0.02 < figures["boundary_map"] < 0.9


@pytest.mark.parametrize("name", ["nuclei_tiny", "coco_tiny"])
def test_boundary_ap_equals_faster_coco_evals_on_real_annotations(name: str, tmp_path: Path) -> None:
    coco = real_annotations(name, "valid")
    rows = load_coco(REAL_DATA / name, cache_dir=tmp_path)["valid"]
    predictions = moved(rows, seed=3)
    figures = computed_figures(CocoMap(rows), predictions)
    assert [figures[key] for key in KEYS + SIZES] == pytest.approx(reference_figures(coco, predictions), abs=1e-9)
    assert figures["boundary_map"] < CocoMap(rows)(predictions)["map"]


@pytest.mark.parametrize("seed", [3, 4])
def test_the_same_matching_with_mask_overlaps_gives_the_official_mask_ap(seed: int) -> None:
    coco, predictions = synthetic(40, seed=seed)
    scorer = CocoMap(rows_of(coco), categories_in(coco))
    names = scorer.class_names()
    parts = (match_image(image, len(names)) for image in image_overlaps(scorer, predictions))
    table, official = precisions(concatenate_matches(parts, len(names))), scorer(predictions)
    areas = ["map", "map_small", "map_medium", "map_large"]
    assert [mean_of_present(table[:, k]) for k in range(4)] == pytest.approx([official[key] for key in areas], abs=1e-9)
    for index, one in enumerate(names):
        assert mean_of_present(table[index, 0]) == pytest.approx(official[f"map_class/{one}"], abs=1e-9)


def test_at_most_a_hundred_predictions_per_class_and_image_count() -> None:
    coco, _ = synthetic(1, seed=5)
    one = coco["annotations"][0] | {"id": 1, "iscrowd": 0}
    coco["annotations"] = [one]
    counts, size = one["segmentation"]["counts"].encode(), tuple(one["segmentation"]["size"])
    wrong = coco_mask.encode(np.zeros(size, np.uint8, order="F"))["counts"]
    for place, expected in ((99, 1 / 100), (100, 0.0)):
        entries = [(one["category_id"], 1 - k / 1000, wrong) for k in range(120)]
        entries[place] = (one["category_id"], 1 - place / 1000, counts)
        found = [instances_from(one["image_id"], size, entries)]
        assert computed_figures(CocoMap(rows_of(coco), categories_in(coco)), found)["boundary_map"] == pytest.approx(
            expected
        )
