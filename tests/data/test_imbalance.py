"""Samples with rare classes are repeated, and class weights follow from the numbers of objects."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import Category
from m2f_trainer.data.imbalance import RepeatedSamples, repeat_factors, resolve_weights, weights_text
from m2f_trainer.data.tiles import TileTransform, TrainTiles
from m2f_trainer.data.transforms import EvalTransform, TrainTransform
from m2f_trainer.errors import RecipeError
from m2f_trainer.masks.segmentation import encode

CLASSES = [Category(3, "cell"), Category(7, "rare"), Category(9, "rarest")]
PLAIN: dict[str, Any] = {"lsj_min_scale": 1.0, "lsj_max_scale": 1.0, "flip": False}


def write_rows(folder: Path, images: list[list[tuple[int, int]]], size: tuple[int, int] = (20, 40)) -> Dataset:
    """A split of images whose objects are (category id, x): squares of 4 pixels."""
    Image.new("RGB", size[::-1], "white").save(folder / "white.png")
    rows = []
    for number, objects in enumerate(images):
        entries = []
        for k, (category, x) in enumerate(objects):
            bitmap = np.zeros(size, np.uint8)
            bitmap[4:8, x : x + 4] = 1
            entries.append({"id": k, "category_id": category, "iscrowd": False, "counts": encode(bitmap)})
        image = {"path": str(folder / "white.png"), "bytes": None}
        rows.append({"image": image, "image_id": number, "height": size[0], "width": size[1], "objects": entries})
    return Dataset.from_list(rows)


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    """Of 16 images all have a cell, 4 also the rare class, and one of those also the rarest."""
    images = [[(3, 2)] * 2 for _ in range(12)] + [[(3, 2), (7, 10)] for _ in range(3)] + [[(9, 2), (7, 10), (3, 20)]]
    return write_rows(tmp_path, images)


def test_repeat_factors_are_those_of_lvis(rows: Dataset) -> None:
    samples = RepeatedSamples(InstanceDataset(rows, EvalTransform(64, 64), CLASSES), 0.5, 0)
    root = np.sqrt(2)  # of 0.5 / (4 / 16)
    assert samples.class_factors == pytest.approx([1, root, np.sqrt(8)])
    assert samples.factors == pytest.approx([1] * 12 + [root] * 3 + [np.sqrt(8)])
    assert len(samples) == 20  # 12 + 3 x 1.41 + 2.83 = 19.07
    assert repeat_factors(np.array([0.0, 0.001]), 0.001).tolist() == [1.0, 1.0]


def test_every_epoch_has_each_sample_its_repeat_factor_times_on_average(rows: Dataset) -> None:
    samples = RepeatedSamples(InstanceDataset(rows, EvalTransform(64, 64), CLASSES), 0.5, 0)
    epochs = [Counter(samples.chosen(epoch).tolist()) for epoch in range(2000)]
    assert all(sum(epoch.values()) == len(samples) for epoch in epochs)
    assert all(set(epoch) == set(range(16)) for epoch in epochs), "no image is left out"
    means = np.array([np.mean([epoch[image] for epoch in epochs]) for image in range(16)])
    assert means == pytest.approx(samples.factors * len(samples) / samples.factors.sum(), abs=0.03)
    assert max(epoch[15] for epoch in epochs) - min(epoch[15] for epoch in epochs) == 1


def test_an_epoch_is_a_function_of_its_number_and_the_seed(rows: Dataset) -> None:
    plain = InstanceDataset(rows, EvalTransform(64, 64), CLASSES)
    first, again, other = (RepeatedSamples(plain, 0.5, seed) for seed in (1, 1, 2))
    first.chosen(4)
    assert all(first.chosen(epoch).tolist() == again.chosen(epoch).tolist() for epoch in (9, 0, 5))
    assert any(first.chosen(epoch).tolist() != other.chosen(epoch).tolist() for epoch in range(5))


def test_repeats_of_a_sample_have_different_augmentation(rows: Dataset) -> None:
    samples = RepeatedSamples(InstanceDataset(rows, TrainTransform(64, 64, color_jitter=0.5), CLASSES), 0.5, 0)
    last = [index for index, image in enumerate(samples.chosen(0).tolist()) if image == 15]
    assert len(last) >= 2
    one, two = (samples.sample(index, 0) for index in last[:2])
    assert one["image_id"] == two["image_id"] == 15
    assert not np.array_equal(one["pixel_values"], two["pixel_values"])
    assert samples.objects().tolist() == [len(rows[image]["objects"]) for image in samples.chosen(0).tolist()]


def test_without_a_class_below_the_threshold_the_samples_stay_as_they_are(rows: Dataset) -> None:
    samples = RepeatedSamples(InstanceDataset(rows, EvalTransform(64, 64), CLASSES), 0.01, 0)
    assert [samples.chosen(epoch).tolist() for epoch in (0, 8)] == [list(range(16))] * 2
    assert "0 of 3 classes are repeated" in samples.summary()


def test_the_summary_names_the_rarest_classes_first(rows: Dataset) -> None:
    samples = RepeatedSamples(InstanceDataset(rows, EvalTransform(64, 64), CLASSES), 0.5, 0)
    assert samples.summary() == (
        "repeat_factor_threshold 0.5: 20 samples per epoch instead of 16; 2 of 3 classes are repeated: "
        "rarest 2.8 times (in 1 of 16), rare 1.4 times (in 4 of 16)"
    )


def test_tiles_are_repeated_for_the_objects_in_them(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [[(3, 2), (3, 22)]] * 3 + [[(3, 2), (7, 22)]])  # two tiles of 20 pixels an image
    tiles = TrainTiles(rows, TileTransform(64, 64, 20, **PLAIN), CLASSES)
    assert len(tiles) == 8
    samples = RepeatedSamples(tiles, 0.5, 0)
    assert samples.class_samples.tolist() == [7, 1, 0]
    assert len(samples) == 9  # 7 + sqrt(0.5 / (1 / 8))
    shown = Counter((row["image_id"], row["cell"].column) for row in (samples.row(k, 3) for k in range(9)))
    assert shown == {**{(image, column): 1 for image in range(4) for column in range(2)}, (3, 1): 2}
    labels = [samples.sample(k, 3)["class_labels"].tolist() for k in range(9)]
    assert sum(1 in some for some in labels) == 2


def test_tiles_that_take_turns_are_repeated_in_the_epochs_that_have_them(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [[(3, 2), (3, 22)]] * 3 + [[(3, 2), (7, 22)]])
    tiles = TrainTiles(rows, TileTransform(64, 64, 20, **PLAIN), CLASSES, 0.0, 1)  # one tile of an image and epoch
    samples = RepeatedSamples(tiles, 0.5, 0)
    assert samples.class_samples.tolist() == [3.5, 0.5, 0]  # in every second epoch
    assert len(samples) == 5  # 3.5 + 0.5 x 2, rounded up
    for epoch in range(4):
        cells = [row for row in (samples.row(index, epoch) for index in range(5)) if row["image_id"] == 3]
        rare = sum(row["cell"].column == 1 for row in cells)
        assert rare == (2 if 7 in tiles.units(epoch).tolist() else 0)


def test_balanced_weights_follow_the_root_of_the_counts(rows: Dataset) -> None:
    samples = InstanceDataset(rows, EvalTransform(64, 64), CLASSES)
    weights = resolve_weights("balanced", samples)
    counts = {"cell": 28, "rare": 4, "rarest": 1}
    assert weights["rarest"] / weights["rare"] == pytest.approx(2, abs=1e-3)
    assert weights["rare"] / weights["cell"] == pytest.approx(np.sqrt(7), abs=1e-3)
    assert sum(weights[name] * count for name, count in counts.items()) / 33 == pytest.approx(1, abs=1e-3)
    assert weights_text(weights, samples) == (
        "class_weights of 3 classes: rarest 3.98 (1 of 33 objects), rare 1.99 (4 of 33 objects), "
        "cell 0.7521 (28 of 33 objects)"
    )


def test_weights_by_name_leave_the_others_at_one(rows: Dataset) -> None:
    samples = InstanceDataset(rows, EvalTransform(64, 64), CLASSES)
    assert resolve_weights({"rare": 5}, samples) == {"cell": 1, "rare": 5, "rarest": 1}
    with pytest.raises(RecipeError, match=r"no class 'rares'; the nearest is 'rare"):
        resolve_weights({"rares": 5}, samples)
