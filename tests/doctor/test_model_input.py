"""The sizes that a model will see, and the objects that don't fit. Scales and sides are computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_trainer.cli import main as cli
from m2f_trainer.cli.train import choose
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.model_input import ModelInput
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.doctor.summary import summary_text
from tests.data.folders import annotation, content, write

WIDE = {"id": 1, "file_name": "a.png", "height": 300, "width": 400}


def dataset(folder, side: int, count: int = 1):
    """One training and one validation image of 400 x 300 pixels with `count` squares of `side` pixels."""
    squares = [
        annotation(k, segmentation=[square(20 * k, side)], bbox=[20 * k, 10, side, side], area=side * side)
        for k in range(1, count + 1)
    ]
    for split in ("train", "valid"):
        write(folder, {**content(*squares), "images": [WIDE]}, split)
        noise = np.random.default_rng(len(split)).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / split / "a.png")
    return folder


def square(x: int, side: int) -> list[int]:
    return [x, 10, x + side, 10, x + side, 10 + side, x, 10 + side]


def kinds(folder, settings: Settings | None = None) -> set[str]:
    return {one.kind for one in examine(folder, settings).findings if one.kind in ("tiny-object", "many-instances")}


def test_an_image_is_scaled_to_fit_and_a_tile_to_the_input_whatever_the_image():
    assert ModelInput(336, 336).scales((300, 400)) == (0.84, 0.84)
    assert ModelInput(112, 112, tile_size=80).scales((300, 400)) == (1.4, 1.4)
    assert str(ModelInput(112, 96)) == "96x112"
    assert str(ModelInput(112, 112, tile_size=80)) == "112x112 (tiles of 80x80)"


@pytest.mark.parametrize(("side", "found"), [(9, {"tiny-object"}), (10, set())])  # 3.6 and 4 pixels wide
def test_an_object_below_one_cell_of_the_masks_is_tiny_at_the_models_input_size(tmp_path, side, found):
    assert kinds(dataset(tmp_path, side), Settings(160, 160)) == found


def test_without_sizes_those_count_that_training_chooses_here(tmp_path):
    """Objects of 12 pixels in images of 400: on a machine without GPU tiles of 56 pixels (4.7 sides) times 1.4."""
    if torch.accelerator.is_available():
        pytest.skip("the sizes are those for a machine without GPU")
    folder = dataset(tmp_path, 12, count=7)
    result = examine(folder)
    assert (result.seen.tile_size, result.seen.height, result.seen.num_queries) == (56, 84, None)
    assert "object side at 84x84 (tiles of 56x56): median 18 px" in summary_text(result)
    assert "queries" not in summary_text(result)
    assert kinds(folder) == set()
    assert kinds(folder, Settings(112, 112)) == {"tiny-object"}  # 12 pixels x 112 / 400
    chosen = choose({"dataset_name": str(folder)})  # by m2f train
    assert (chosen["tile_size"], chosen["image_height"], chosen["image_width"]) == (56, 84, 84)


def test_one_side_stands_for_both_and_means_whole_images_unless_tiles_are_given(tmp_path):
    folder = dataset(tmp_path, 12)
    assert examine(folder, Settings(image_width=224)).seen == ModelInput(224, 224)
    assert examine(folder, Settings(128, 256, tile_size=64)).seen == ModelInput(128, 256, 64)
    assert examine(folder, Settings(tile_size=100)).seen.tile_size == 100


def test_images_with_more_objects_than_the_given_queries_are_reported(tmp_path):
    folder = dataset(tmp_path, 12, count=5)
    assert kinds(folder, Settings(400, 400, num_queries=4)) == {"many-instances"}
    assert kinds(folder, Settings(400, 400, num_queries=5)) == set()
    assert kinds(folder, Settings(400, 400, num_queries=4, tile_size=64)) == set()  # a tile holds fewer
    assert kinds(folder, Settings(400, 400)) == set()


def test_the_preview_shows_what_the_model_will_see(tmp_path, monkeypatch):
    folder = dataset(tmp_path / "data", 12)
    monkeypatch.chdir(tmp_path)
    sizes = {}
    for words in (["--tile_size", "64", "--image_width", "128"], ["--image_width", "96"]):
        assert cli.main(["check", str(folder), *words, "--preview", "1"]) == 0
        with Image.open(tmp_path / "preview" / "sample_000.jpg") as image:
            sizes[words[0]] = image.size
    assert sizes == {"--tile_size": (128, 128), "--image_width": (96, 96)}
