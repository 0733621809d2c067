"""What training would refuse is found before it starts."""

import datasets
import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.dataset import Category, load_coco
from m2f_trainer.data.validate import check_categories, check_dataset
from m2f_trainer.errors import DataError, ImageError
from tests.data.folders import REAL, annotation, content, needs_real_data, write


@needs_real_data
@pytest.mark.parametrize("name", ["coco_tiny", "nuclei_tiny"])
def test_real_data_passes(name, tmp_path):
    check_dataset(load_coco(REAL / name, cache_dir=tmp_path))


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "set", content(), split="valid")
    return write(tmp_path / "set", content())


def load(root):
    return load_coco(root, cache_dir=root.parent / "cache")


def test_a_missing_split_is_named_with_those_that_are_there(root):
    with pytest.raises(DataError, match="expected a split 'test' with images, found train, valid"):
        check_dataset(load(root), evaluation=["test"])


def test_a_missing_image_is_named(root):
    (root / "valid/a.png").unlink()
    with pytest.raises(ImageError, match=r"split 'valid': 1 image.*\n.*image 1 .*valid/a\.png.*can't be read"):
        check_dataset(load(root))


def test_a_damaged_image_is_named(root):
    noise = np.random.default_rng(0).integers(0, 255, size=(16, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train/a.png")
    (root / "train/a.png").write_bytes((root / "train/a.png").read_bytes()[:-300])
    with pytest.raises(ImageError, match=r"image 1 .*train/a\.png.*damaged"):
        check_dataset(load(root))


def test_a_size_that_differs_from_the_annotations_is_named(root):
    Image.new("RGB", (40, 32)).save(root / "train/a.png")
    with pytest.raises(ImageError, match="expected 20x16 pixels as its annotations say, got 40x32"):
        check_dataset(load(root))


def test_the_first_ten_of_many_bad_images_are_listed(root):
    images = [{"id": i, "file_name": f"{i}.png", "height": 16, "width": 20} for i in range(1, 26)]
    write(root, content(images=images))
    with pytest.raises(ImageError, match=r"25 image\(s\) can't be used(?s:.*)and 15 more") as error:
        check_dataset(load(root))
    assert str(error.value).count("\n") == 11


def test_a_training_split_of_crowd_regions_alone_is_refused(root):
    crowd = annotation(segmentation={"size": [16, 20], "counts": [300, 20]}, iscrowd=1)
    write(root, content(crowd))
    with pytest.raises(DataError, match="found only crowd regions or none"):
        check_dataset(load(root))
    check_dataset(load(root), train="", evaluation=["train"])


def test_a_validation_split_without_objects_is_refused(root):
    with_objects = load(root)["valid"]
    write(root, {**content(), "annotations": []}, split="valid")
    splits = load(root)
    with pytest.raises(DataError, match="split 'valid': expected objects to score on"):
        check_dataset(splits)
    splits["valid"] = datasets.concatenate_datasets([splits["valid"], with_objects]).select([0])
    with pytest.raises(DataError, match="split 'valid'"):
        check_dataset(splits)


@pytest.mark.parametrize(
    ("name", "sound"), [("cell", True), (" Cell", True), ("5", True), ("nucleus", False), ("7", False)]
)
def test_an_id_that_means_another_class_to_the_model_is_refused(name, sound, root):
    rows = load(root)["valid"]
    known = [Category(2, "wall"), Category(5, name)]
    if sound:
        check_categories(known, rows)
        return
    with pytest.raises(DataError, match=f"category 5 is '{name}' to the model and 'cell' in the dataset"):
        check_categories(known, rows)
