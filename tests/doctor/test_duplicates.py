"""Duplicates are detected despite scaling, other formats and small edits; different images are not matched."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.images import open_image
from m2f_trainer.data.problems import kind_of
from m2f_trainer.data.reading import Reading
from m2f_trainer.doctor.duplicates import ImageFacts, find_duplicates, read_facts, same_in_detail
from m2f_trainer.errors import ImageError
from tests.data.folders import REAL, needs_real_data


def stored(image: Image.Image, form: str = "PNG", **options: object) -> ImageFacts:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return read_facts({"path": None, "bytes": buffer.getvalue()}, "image", (image.height, image.width), Reading())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    rows = load_coco(REAL / "coco_tiny", cache_dir=tmp_path_factory.mktemp("cache"))["train"]
    return [open_image(row["image"], "photo") for row in rows]


@needs_real_data
def test_photos_are_recognised_after_scaling_and_compression(photos):
    for photo in photos[:8]:
        half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
        forms = [stored(photo), stored(photo, "JPEG", quality=40), stored(half), stored(photo.convert("L"))]
        darker = ImageEnhance.Brightness(photo).enhance(0.9)
        assert list(find_duplicates([*forms, stored(darker)])) == [(0, 1), (0, 2), (0, 3), (0, 4)]
        assert all(same_in_detail(photo, other) for other in (half, photo.convert("L"), darker))


@needs_real_data
def test_different_photos_and_their_mirror_images_are_no_duplicates(photos):
    mirrored = [photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for photo in photos]
    assert list(find_duplicates([stored(photo) for photo in [*photos, *mirrored]])) == []


def test_blank_images_are_the_same_only_where_every_pixel_is():
    black, white = (stored(Image.new("RGB", (30, 20), color)) for color in ("black", "white"))
    assert list(find_duplicates([black, white, black, white])) == [(0, 2), (1, 3)]
    assert list(find_duplicates([])) == []


def test_facts_of_an_image_are_mode_and_orientation_and_errors_have_a_kind(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = stored(Image.fromarray(np.zeros((20, 30), dtype=np.uint8)).convert("P"), exif=exif)
    assert (seen.mode, seen.orientation) == ("P", 6)
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (3, 4)).save(tmp_path / "small.png")
    expected = {"none": "missing-image", "empty.png": "bad-image", "small.png": "wrong-image-size"}
    for name, kind in expected.items():
        with pytest.raises(ImageError) as error:
            read_facts({"path": str(tmp_path / name), "bytes": None}, "a", (9, 9), Reading())
        assert kind_of(error.value) == kind


def test_many_equal_or_similar_images_are_compared_once_each():
    """700 copies of one image and 700 slightly different ones: each is a duplicate of the first only."""
    rng = np.random.default_rng(0)
    first = stored(Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)))
    similar = []
    for k in range(700):
        noise = first.thumbnail + rng.normal(0, 0.001, 256)
        unit = (noise / np.linalg.norm(noise)).astype(np.float32)
        similar.append(ImageFacts("L", 1, k.to_bytes(16, "big"), unit))
    images = [first, *[first] * 700, *similar]
    assert list(find_duplicates(images)) == [(0, j) for j in range(1, 1401)]


def test_a_duplicate_belongs_to_its_first_look_alike_in_any_block():
    rng = np.random.default_rng(0)
    faces = [stored(Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))) for _ in range(600)]
    again = [ImageFacts("L", 1, bytes([k % 256, k // 256]), faces[k].thumbnail) for k in (599, 0, 300)]
    assert list(find_duplicates([*faces, *again])) == [(599, 600), (0, 601), (300, 602)]
