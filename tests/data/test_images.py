"""Images come out as 8-bit RGB in stored orientation, or are refused with advice, and nothing unsafe is opened."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.images import SUFFIXES, image_size, open_image
from m2f_trainer.data.transforms import read_image
from m2f_trainer.data.validate import check_dataset
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.page import render
from m2f_trainer.errors import ImageError
from tests.data.corpus import png
from tests.data.honest import dataset

RAMP = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_modes_keep_their_colours(mode, tmp_path):
    grey = Image.fromarray(RAMP)
    image = Image.fromarray(RAMP.astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    opened = open_image(save(image, tmp_path / "a.png"), "a.png")
    expected = grey.convert("1").convert("L") if mode == "1" else grey
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.repeat(np.asarray(expected)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("CMYK", "jpg"), ("RGB", "jpg"), ("L", "bmp"), ("RGB", "webp"), ("P", "gif")]
)
def test_other_formats_are_read_as_pillow_reads_them(mode, suffix, tmp_path):
    path = save(Image.fromarray(RAMP).convert(mode), tmp_path / f"a.{suffix}")
    with Image.open(path) as expected:
        assert np.array_equal(np.asarray(open_image(path, "a")), np.asarray(expected.convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colours(tmp_path):
    path = save(Image.fromarray(RAMP).convert("P"), tmp_path / "a.png", transparency=0)
    assert np.array_equal(np.asarray(open_image(path, "a"))[..., 0], RAMP)


def test_an_image_that_was_reduced_after_it_was_annotated_is_refused_with_the_factor(tmp_path):
    path = save(Image.new("RGB", (200, 160)), tmp_path / "a.png")
    with pytest.raises(
        ImageError, match=r"1000x800 pixels .* got 200x160\. .*resized .* to 0\.2 times its size\..*mult"
    ):
        open_image(path, "a", size=(800, 1000))
    with pytest.raises(ImageError, match="Correct `width` and `height`, or restore"):
        open_image(path, "a", size=(160, 201))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(path, "a").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_left_alone_as_annotations_are_in_stored_pixels(orientation, form, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(RAMP), tmp_path / f"a.{form}", exif=exif)
    assert image_size(path, "a") == (12, 16)
    assert np.array_equal(np.asarray(open_image(path, "a"))[..., 0], RAMP)


@pytest.mark.parametrize(
    "array", [np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)]
)
def test_pixels_without_one_right_conversion_are_refused(array, tmp_path):
    path = save(Image.fromarray(array), tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"unambiguous conversion|expected values of 0 to 65535"):
        open_image(path, "a.tif")


def tiff(values: np.ndarray, *extra: int) -> bytes:
    """An uncompressed TIFF file of values (H, W, C), written here because Pillow writes few kinds; grey with fewer than
    three channels. `extra`: the meaning of channels beyond these, 0 unknown or 2 alpha.
    """
    height, width, channels = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    each, data = [8 * values.dtype.itemsize] * channels, values.tobytes()
    tags = {256: [width], 257: [height], 258: each, 259: [1], 262: [1 if channels < 3 else 2], 277: [channels]}
    tags |= {273: [8], 278: [height], 279: [len(data)], 338: list(extra), 339: [kind] * channels}
    entries, tail = b"", b""
    used = {key: numbers for key, numbers in sorted(tags.items()) if numbers}
    start = 8 + len(data) + 2 + 12 * len(used) + 4
    for key, numbers in used.items():
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, tail = struct.pack("<I", start + len(tail)), tail + packed
        entries += struct.pack("<HHI", key, 3, len(numbers)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(used)) + entries + bytes(4) + tail


@pytest.mark.parametrize(
    ("values", "extra", "message"),
    [
        (np.zeros((6, 8, 2), np.uint8), (0,), r"expected one image of one channel, .* got 2 channels\. Save one"),
        (np.zeros((6, 8, 1), np.float64), (), r"got 1 channel of 64-bit floating-point numbers\. Save it as one"),
        (np.zeros((6, 8, 1), np.float16), (), r"got 1 channel of 16-bit floating-point numbers\. Save it as one"),
        (np.zeros((6, 8, 3), np.float32), (), r"got 3 channels of 32-bit floating-point numbers\. Save it as one"),
        (np.zeros((6, 8, 2), np.uint16), (2,), r"got 2 channels of 16-bit unsigned integers\. Save it as one"),
    ],
)
def test_a_tiff_of_values_or_channels_that_are_not_read_is_refused_with_what_it_has(values, extra, message):
    with pytest.raises(ImageError, match=message):
        open_image(tiff(values, *extra), "a")


def test_grey_with_alpha_is_grey(tmp_path):
    """A TIFF of 8 bits, and a PNG of 16 bits, of which the low bytes count, too."""
    alpha = np.full_like(RAMP, 9)
    found = open_image(tiff(np.stack([RAMP, alpha], axis=2), 2), "a")
    assert np.array_equal(np.asarray(found)[..., 0], RAMP)
    deep = np.stack([RAMP.astype(np.uint16) * 16 + 5, np.full_like(RAMP, 9, np.uint16)], axis=2).astype(">u2")
    rows = b"".join(b"\1" + _differences(row.tobytes(), 4) for row in deep)  # the filter Sub
    found = open_image(png(16, 12, zlib.compress(rows), 16, 4), "a", pixel_range=(5, 5 + 255 * 16))
    assert np.array_equal(np.asarray(found), np.repeat(RAMP[..., None], 3, axis=2))


def _differences(row: bytes, step: int) -> bytes:
    """Each byte minus the one `step` bytes before."""
    return bytes((one - before) % 256 for one, before in zip(row, bytes(step) + row, strict=False))


def test_paths_bytes_pictures_and_arrays_are_all_images(tmp_path):
    path = save(Image.fromarray(RAMP).convert("RGB"), tmp_path / "a.png")
    expected = np.asarray(open_image(path, "a"))
    sources = [str(path), {"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}]
    for source in [*sources, Image.fromarray(expected), expected, expected[..., 0]]:
        assert np.array_equal(np.asarray(open_image(source, "a")), expected)
    for wrong in (expected / 255.0, expected.transpose(2, 0, 1), expected[0, 0]):
        with pytest.raises(ImageError, match=r"expected an array \(H, W\)"):
            open_image(wrong, "a")
    with pytest.raises(ImageError, match="got neither"):
        open_image({"path": None, "bytes": None}, "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page: the download failed"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (bytes(range(128, 144)), "not an image of a known format"),
    ],
)
def test_files_that_are_no_image_are_refused_with_what_they_look_like(content, message, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        open_image(tmp_path / "a.jpg", "image 3")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_file_is_refused(suffix, tmp_path):
    path = save(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)),
        tmp_path / f"a.{suffix}",
    )
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ImageError, match="image 3: the image data is damaged"):
        open_image(path, "image 3")


def test_missing_files_folders_and_pipes_are_refused_without_opening_them(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path / "pipe.png", "a")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path, "a")
    for path in (tmp_path / "none.png", "a\0b.png"):
        with pytest.raises(ImageError, match="can't be read"):
            open_image(path, "a")


@pytest.mark.parametrize("side", [13_000, 100_000])
def test_decompression_bombs_are_refused_by_their_header(side, tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    for read in (open_image, image_size):
        with pytest.raises(ImageError, match="expected at most 89,478,485 pixels"):
            read(tmp_path / "a.png", "a")


def test_another_size_than_the_annotations_is_refused_and_a_turned_one_explained(tmp_path):
    path = save(Image.fromarray(RAMP), tmp_path / "a.png")
    assert open_image(path, "a", size=(12, 16)).size == (16, 12)
    with pytest.raises(ImageError, match="expected 8x6 pixels as its annotations say, got 16x12"):
        open_image(path, "a", size=(6, 8))
    with pytest.raises(ImageError, match="Width and height are swapped"):
        open_image(path, "a", size=(16, 12))


def test_a_jpeg_is_decoded_small_only_as_far_as_asked():
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480), "red").save(buffer, "JPEG")
    source = {"path": None, "bytes": buffer.getvalue()}
    assert open_image(source, "a", size=(480, 640), shrink_to=(100, 140)).size == (160, 120)
    assert open_image(source, "a", size=(480, 640), shrink_to=(400, 600)).size == (640, 480)


def turned_photo(path: Path, orientation: int) -> np.ndarray:
    """Saves a photo of 40 x 24 stored pixels with an EXIF orientation; returns it as viewers show it."""
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_new_photos_are_read_as_viewers_show_them(form, orientation, tmp_path):
    shown = turned_photo(tmp_path / f"a.{form}", orientation)
    found = np.asarray(open_image(tmp_path / f"a.{form}", "photo", displayed=True))
    assert np.array_equal(found, shown)


def test_heic_photos_are_read_with_the_extra(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra `heic` is not installed")
    pillow_heif.register_heif_opener()
    stored = Image.fromarray(RAMP).resize((64, 48)).convert("RGB")
    stored.save(tmp_path / "a.heic", quality=100)
    found = np.asarray(open_image(tmp_path / "a.heic", "a", displayed=True)).astype(int)
    assert np.abs(found - np.asarray(stored)).max() < 12
    assert ".heic" in SUFFIXES


def test_heic_photos_without_the_extra_name_it(tmp_path, monkeypatch):
    monkeypatch.setattr("m2f_trainer.data.images.HEIF", False)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(ImageError, match=r"may be HEIC: pip install 'm2f-trainer\[heic\]' to read .* as JPEG"):
        open_image(tmp_path / "a.heic", "a")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_image_is_turned_where_its_annotations_have_the_displayed_size(orientation, tmp_path):
    turned_photo(tmp_path / "stored.png", orientation)
    with Image.open(tmp_path / "stored.png") as stored:
        for form in ("png", "tif"):
            shown = turned_photo(tmp_path / f"a.{form}", orientation)
            assert np.array_equal(open_image(tmp_path / f"a.{form}", "photo", size=(40, 24)), shown)
            assert np.array_equal(open_image(tmp_path / f"a.{form}", "photo", size=(24, 40)), stored)
    turned_photo(tmp_path / "a.jpg", orientation)
    assert open_image(tmp_path / "a.jpg", "photo", size=(40, 24), shrink_to=(20, 12)).size == (12, 20)


def test_a_dataset_in_the_displayed_frame_is_trained_and_shown_in_it(tmp_path):
    def change(coco):
        for image in coco["images"]:
            image.update(width=16, height=20)

    root = dataset(tmp_path / "set", change)
    for path in (root / "images").iterdir():
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(path) as image:
            image.convert("RGB").save(path, exif=exif)
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    check_dataset(splits)
    assert read_image(splits["train"][0]).size == (16, 20)
    examination = examine(root)
    assert examination.status == 0
    assert {one.kind: one.count for one in examination.findings if one.severity == "note"}["turned-image"] in (5, 6)
    assert "image turned by its EXIF orientation" in render(examination)
