"""Parts of large images are read to the pixel, and files that can't be read are refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from m2f_trainer.data.images import open_image
from m2f_trainer.errors import ImageError, MissingPackageError
from m2f_trainer.inference.windows import TiffWindows, Windows, open_windows, pixels_in_memory
from tests.inference.test_tiles import scene


@pytest.mark.parametrize(
    "options", [{"tile": (32, 48)}, {"rowsperstrip": 17}, {"tile": (32, 48), "compression": "zlib"}]
)
def test_a_tiff_is_read_by_windows_to_the_pixel(options: dict[str, object], tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    pixels = np.random.default_rng(0).integers(0, 255, (101, 143, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    windows = open_windows(tmp_path / "a.tif")
    assert isinstance(windows, TiffWindows)
    assert windows.size == (101, 143)
    for x0, y0, x1, y1 in ((0, 0, 143, 101), (40, 30, 100, 70), (142, 100, 143, 101)):
        assert np.array_equal(windows.read((x0, y0, x1, y1)), pixels[y0:y1, x0:x1])


@pytest.mark.parametrize("alpha", ["assocalpha", "unassalpha"])
def test_colours_that_are_stored_multiplied_by_alpha_are_divided_as_where_the_file_is_decoded_whole(
    alpha: str, tmp_path: Path
) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    pixels = np.random.default_rng(0).integers(1, 255, (101, 143, 4), np.uint8)
    if alpha == "assocalpha":
        pixels[..., :3] = pixels[..., :3].astype(int) * pixels[..., 3:] // 255
    options = {"tile": (32, 48), "photometric": "rgb", "extrasamples": [alpha]}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    windows = open_windows(tmp_path / "a.tif")
    assert isinstance(windows, TiffWindows)
    whole = np.asarray(open_image(tmp_path / "a.tif", "a.tif"))
    assert np.array_equal(windows.read((40, 30, 143, 70)), whole[30:70, 40:143])


def test_other_files_are_decoded_whole(tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png")
    windows: Windows = open_windows(tmp_path / "a.png")
    assert np.array_equal(windows.read((7, 5, 30, 9)), scene()[5:9, 7:30])


def test_a_tiff_whose_range_of_values_is_unknown_asks_for_it_and_is_read_with_it(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    values = np.linspace(0, 1, 9 * 11, dtype=np.float32).reshape(9, 11)
    tifffile.imwrite(tmp_path / "a.tif", values)
    with pytest.raises(ImageError, match=r"a\.tif: .*Give the values of black and white as pixel_range, such as 0,1"):
        open_windows(tmp_path / "a.tif")
    read = open_windows(tmp_path / "a.tif", (0.0, 1.0)).read((0, 0, 11, 9))
    assert np.array_equal(read, np.rint(values.astype(np.float64) * 255)[..., None].repeat(3, axis=-1))
    tifffile.imwrite(tmp_path / "b.tif", np.full((9, 11), -300, np.int32))
    with pytest.raises(ImageError, match=r"expected values of 0 to 65535, got -300 to -300\. Give .* as pixel_range"):
        open_windows(tmp_path / "b.tif")


def test_a_deep_tiff_that_cannot_be_decoded_whole_is_refused_with_the_form_to_convert_it_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 11), np.float64))  # Pillow doesn't know these
    with pytest.raises(ImageError, match=r"8-bit grey, RGB or RGBA .* float64, .* `vips tiffsave --tile`"):
        open_windows(tmp_path / "a.tif")
    monkeypatch.setattr("m2f_trainer.inference.windows.pixels_in_memory", lambda: 90)
    monkeypatch.setenv("M2F_MAX_PIXELS", "90")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((9, 11), np.float32))
    with pytest.raises(ImageError, match=r"8-bit grey, RGB or RGBA .* float32, .* `vips tiffsave --tile`"):
        open_windows(tmp_path / "b.tif")


@pytest.mark.parametrize("orientation", [2, 6])
def test_a_tiff_that_viewers_turn_is_read_as_they_show_it(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(scene()).save(tmp_path / "a.tif", exif=exif)
    with Image.open(tmp_path / "a.tif") as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    windows = open_windows(tmp_path / "a.tif")
    assert windows.size == shown.shape[:2]
    assert np.array_equal(windows.read((1, 2, 20, 30)), shown[2:30, 1:20])


def tiffs(folder: Path) -> list[Path]:
    """TIFFs whose stored samples aren't the colours that they show, or that tifffile alone can't decompress."""
    tifffile = pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    picture.quantize(16).save(folder / "palette.tif")
    picture.convert("CMYK").save(folder / "cmyk.tif")
    picture.convert("1").save(folder / "bilevel.tif")
    picture.save(folder / "lzw.tif", compression="tiff_lzw")
    picture.save(folder / "jpeg.tif", compression="jpeg")
    picture.save(folder / "a_jpeg_by_another_name.tif", format="JPEG")
    grey = np.asarray(picture.convert("L"))
    tifffile.imwrite(folder / "white_is_zero.tif", grey, photometric="miniswhite")
    tifffile.imwrite(folder / "deep.tif", grey.astype(np.uint16) * 257)
    return sorted(folder.iterdir())


def test_a_tiff_of_any_colours_and_compression_is_the_same_by_windows_as_whole(tmp_path: Path) -> None:
    for path in tiffs(tmp_path):
        windows = open_windows(path)
        height, width = windows.size
        assert np.array_equal(windows.read((0, 0, width, height)), np.asarray(open_image(path, path.name))), path.name


def test_a_tile_that_was_never_written_is_black_and_a_damaged_one_an_error(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    path, pixels = tmp_path / "a.tif", np.random.default_rng(0).integers(1, 255, (64, 64, 3), np.uint8)
    tifffile.imwrite(path, pixels, tile=(32, 32), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as file:
        offsets, counts = (file.pages[0].tags[name] for name in ("TileOffsets", "TileByteCounts"))
        third = offsets.value[2]
        offsets.overwrite([offsets.value[0], 0, *offsets.value[2:]])
        counts.overwrite([counts.value[0], 0, *counts.value[2:]])
    windows = open_windows(path)
    assert not windows.read((32, 0, 64, 32)).any()
    assert np.array_equal(windows.read((32, 32, 64, 64)), pixels[32:, 32:])
    with path.open("r+b") as file:
        file.seek(third)
        file.write(b"damaged")
    with pytest.raises(ImageError, match=r"part 2 of the TIFF can't be decoded .* Replace the file"):
        windows.read((0, 32, 32, 64))


def test_a_tiff_too_large_for_memory_that_lacks_a_codec_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    if importlib.util.find_spec("imagecodecs") is not None:
        pytest.skip("imagecodecs is installed")
    Image.fromarray(scene()).save(tmp_path / "a.tif", compression="tiff_lzw")
    monkeypatch.setattr("m2f_trainer.inference.windows.pixels_in_memory", lambda: 100)
    monkeypatch.setenv("M2F_MAX_PIXELS", "100")
    with pytest.raises(ImageError, match=r"LZW.*pip install imagecodecs"):
        open_windows(tmp_path / "a.tif")


def test_an_image_too_large_to_decode_is_refused_with_the_format_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2f_trainer.inference.windows.pixels_in_memory", lambda: 100)
    monkeypatch.setenv("M2F_MAX_PIXELS", "100")
    Image.fromarray(scene()).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"at most 100 pixels, got 210x150 = 31,500\. Cut .* --max_pixels"):
        open_windows(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_tiff_that_ends_after_its_start_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    (tmp_path / "a.tif").write_bytes(b"II*\0nothing but a start")
    with pytest.raises(ImageError, match=r"a\.tif: the TIFF's header is damaged"):
        open_windows(tmp_path / "a.tif")


def test_a_large_tiff_without_tifffile_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.tif")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("m2f_trainer.inference.windows.pixels_in_memory", lambda: 100)
    monkeypatch.setenv("M2F_MAX_PIXELS", "100")
    with pytest.raises(MissingPackageError, match=r"m2f-trainer\[tiff\]"):
        open_windows(tmp_path / "a.tif")


def test_a_png_or_jpeg_beyond_the_limit_is_read_where_it_fits_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2F_MAX_PIXELS", "100")
    Image.fromarray(scene()).save(tmp_path / "a.png")
    assert np.array_equal(open_windows(tmp_path / "a.png").read((10, 20, 40, 60)), scene()[20:60, 10:40])
    monkeypatch.setattr("m2f_trainer.inference.windows.pixels_in_memory", lambda: 31_499)
    with pytest.raises(ImageError, match=r"at most 31,499 pixels, got 210x150 = 31,500"):
        open_windows(tmp_path / "a.png")


def test_the_pixels_that_fit_in_memory_are_a_part_of_it() -> None:
    assert 10**6 < pixels_in_memory() <= 2**31 - 1


def test_a_stack_of_pages_is_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 20, 30), np.uint8), photometric="minisblack")
    with pytest.raises(ImageError, match=r"got several pages of one size"):
        open_windows(tmp_path / "a.tif")
