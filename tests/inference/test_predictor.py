"""A predictor takes any image and gives what evaluation would."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from m2f_trainer.errors import ArgumentError, ImageError, MissingImageError
from m2f_trainer.inference.predictor import Predictor, uses_bf16
from m2f_trainer.model.mask2former import M2FConfig
from tests.model.tiny import tiny_model


class BrightnessModel(torch.nn.Module):
    """Finds what is bright: one query whose mask logits are the image's own grey levels, four pixels to a cell."""

    def __init__(self) -> None:
        super().__init__()
        categories = [{"id": 7, "name": "light"}, {"id": 3, "name": "other"}]
        self.config = M2FConfig(categories=categories, image_height=64, image_width=96)
        self.device = torch.device("cpu")
        self.batches: list[int] = []

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Mask2FormerForUniversalSegmentationOutput:
        self.batches.append(len(pixel_values))
        grey = pixel_values.float().mean(1, keepdim=True) / 16 - 8
        masks = torch.nn.functional.avg_pool2d(grey, 4)
        classes = torch.tensor([[[9.0, 0.0, 0.0]]]).expand(len(pixel_values), 1, 3)
        return Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)


class UnevenModel(torch.nn.Module):
    """Finds what is brighter than 60 in tiles of 80 pixels, as sure as the 70th column of the tile is bright."""

    def __init__(self) -> None:
        super().__init__()
        frame = {"image_height": 80, "image_width": 80, "tile_size": 80, "tile_overlap": 0.3}
        self.config = M2FConfig(categories=[{"id": 7, "name": "light"}], **frame)
        self.device = torch.device("cpu")

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Mask2FormerForUniversalSegmentationOutput:
        grey = pixel_values[:, 0].float()  # (B, H, W)
        sure = (grey[:, 32, 70] / 255).clamp(1e-4, 1 - 1e-4)
        classes = torch.stack([sure.log(), (1 - sure).log()], -1)[:, None]  # (B, 1, 2)
        masks = (grey[:, None] > 60) * 40.0 - 20  # (B, 1, H, W)
        return Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(BrightnessModel())  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_given_by_its_path_is_drawn_on_as_it_was_predicted(
    orientation: int, predictor: Predictor, tmp_path: Path
) -> None:
    path, exif, shown = tmp_path / "photo.png", Image.Exif(), picture(80, 80 if orientation in (1, 3) else 60)
    exif[0x0112] = orientation
    shown.save(path, exif=exif)
    (found,) = predictor(path, threshold=0)
    drawn = np.asarray(found.overlay(path, predictor.names, legend=False))
    upright = ImageOps.exif_transpose(Image.open(path))
    np.testing.assert_array_equal(drawn, np.asarray(found.overlay(upright, predictor.names, legend=False)))
    bright = np.asarray(upright)[..., 0] > 128
    tinted = (drawn != np.asarray(upright)).any(-1)
    assert (bright & tinted).sum() > 0.8 * bright.sum(), "the mask lies on the bright object"
    if orientation > 4:
        with (
            Image.open(path) as stored,
            pytest.raises(ValueError, match="Pass its path: Pillow does not turn a photo by its EXIF orientation"),
        ):
            found.overlay(stored)


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_an_image_of_more_than_8_bits_is_drawn_on_as_it_was_predicted(
    kind: str, predictor: Predictor, tmp_path: Path
) -> None:
    shown, path = picture().point(lambda value: value * 3 // 5), tmp_path / "photo.tif"  # black and grey
    scale = 1000 if kind == "uint16" else 0.5  # the values of black and white are 0 and this
    Image.fromarray((np.asarray(shown)[..., 0] / 255 * scale).astype(kind)).save(path)
    predictor.pixel_range = (0.0, float(scale))
    (found,) = predictor(path, threshold=0)
    expected = np.asarray(found.overlay(shown, predictor.names, legend=False))
    with Image.open(path) as opened:
        for image in (path, str(path), path.read_bytes(), opened, np.asarray(opened)):
            drawn = found.best(9).above(0).overlay(image, predictor.names, legend=False)
            np.testing.assert_array_equal(np.asarray(drawn), expected)


def picture(height: int = 80, width: int = 60) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[20:60, 10:40] = 255
    return Image.fromarray(pixels)


def test_what_is_found_lies_where_it_is_in_the_original_image(predictor: Predictor) -> None:
    (found,) = predictor(picture())
    assert len(found) == 1
    assert found.category_ids.tolist() == [7]
    assert found.size == (80, 60)
    assert found.scores[0] > 0.9
    truth = np.asarray(picture())[:, :, 0] > 0
    mask = found.mask(0).astype(bool)
    assert (mask & truth).sum() / (mask | truth).sum() > 0.85
    assert found.boxes[0] == pytest.approx([10, 20, 30, 40], abs=3)


def test_paths_pil_images_and_arrays_give_the_same(predictor: Predictor, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    images = [tmp_path / "a.png", str(tmp_path / "a.png"), picture(), np.asarray(picture())]
    results = [item.to_coco() for item in predictor(images)]
    assert [entry[0]["image_id"] for entry in results] == [0, 1, 2, 3]
    assert len({entry[0]["segmentation"]["counts"] for entry in results}) == 1
    assert len({entry[0]["score"] for entry in results}) == 1


def test_batches_of_different_sizes_equal_one_by_one(predictor: Predictor) -> None:
    images = [picture(80, 60), picture(61, 200), picture(64, 96)]
    together = predictor(images, batch_size=2)
    assert predictor.model.batches == [2, 1]
    for index, image in enumerate(images):
        (alone,) = predictor(image)
        assert alone.rles == together[index].rles
        assert alone.size == (image.height, image.width)


def test_by_default_each_class_has_the_threshold_that_the_model_holds_or_half(predictor: Predictor) -> None:
    (all_found,) = predictor(picture(), threshold=0.0)
    score, category = float(all_found.scores[0]), int(all_found.category_ids[0])
    assert category == 7
    assert predictor.thresholds() == {7: 0.5, 3: 0.5}
    assert len(predictor(picture())[0]) == (score > 0.5)
    for lowest, count in ((score - 1e-3, 1), (score + 1e-3, 0)):
        predictor.model.config.thresholds = [lowest, 0.0]
        assert (predictor(picture())[0].category_ids == 7).sum() == count


def test_a_threshold_keeps_what_is_above_it(predictor: Predictor) -> None:
    (everything,) = predictor(picture(), threshold=0.0)
    assert len(everything) == 2
    assert len(predictor(picture(), threshold=0.99999)[0]) == 0
    assert len(predictor(picture(), threshold=0.0, top_k=1)[0]) == 1


def test_an_object_in_two_tiles_is_found_at_every_threshold_below_its_own_score() -> None:
    """The tiles are columns 0 to 80 and 48 to 128, with cores that meet at 64; the object is columns 10 to 122."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[20:44, 10:110], pixels[20:44, 110:122] = 230, 115
    predictor = Predictor(UnevenModel())  # type: ignore[arg-type]
    score = ((64 - 10) * 230 / 255 + (122 - 64) * 115 / 255) / 112  # 0.668, of pieces of 0.902 and 0.451
    for threshold in (0.0, 0.02, 0.3, 0.46, 0.66, 0.68):
        (found,) = predictor(pixels, threshold=threshold)
        predictor.model.config.thresholds = [threshold]
        (by_default,) = predictor(pixels)
        for one in (found, by_default):
            assert one.scores.tolist() == pytest.approx([score] if threshold < score else [], abs=1e-5)
            assert one.boxes.tolist() == ([[10, 20, 112, 24]] if threshold < score else [])


@pytest.mark.parametrize(("queries", "most"), [(120, 120), (7, 14)])
def test_every_query_may_find_an_object(queries: int, most: int) -> None:
    """A model of dense images with more than 100 queries; with few, each of two classes may have each query's mask."""
    predictor = Predictor(tiny_model(num_queries=queries), "cpu")
    (found,) = predictor(picture(), threshold=-1.0)
    assert len(found) == most


def test_no_images_give_nothing(predictor: Predictor) -> None:
    assert predictor([]) == []


def test_a_stream_reads_no_more_images_than_a_batch(predictor: Predictor) -> None:
    read = []

    def images():  # type: ignore[no-untyped-def]
        for number in range(5):
            read.append(number)
            yield picture()

    stream = predictor.stream(images(), batch_size=2)
    next(stream)
    assert read == [0, 1]


def test_an_image_may_be_prepared_before_it_is_predicted(predictor: Predictor) -> None:
    images = [picture(), picture(90, 70), picture(60, 50)]
    prepared = [images[0], predictor.whole_frame(images[1]), predictor.whole_frame(images[2])]
    found, truth = list(predictor.stream(prepared, batch_size=2)), predictor(images, batch_size=2)
    assert [one.image_id for one in found] == [0, 1, 2]
    assert [one.to_coco() for one in found] == [one.to_coco() for one in truth]
    with pytest.raises(ImageError, match=r"^upload: not an image of a known format"):
        predictor.whole_frame(b"none", "upload")
    with pytest.raises(ArgumentError, match="this predictor cuts images into tiles"):
        Predictor(tiny_model(tile_size=64, tile_overlap=0.3)).whole_frame(images[0])


def test_an_unreadable_image_is_an_error_with_its_path(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        predictor(path)


def test_a_saved_model_predicts_with_its_own_categories(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    predictor = Predictor.from_pretrained(str(tmp_path / "model"), device="cpu")
    assert predictor.names == {3: "cat", 17: "dog"}
    (found,) = predictor(picture(50, 90), threshold=0.0)
    assert found.size == (50, 90)
    assert set(found.category_ids.tolist()) <= {3, 17}
    assert not predictor.model.training


def test_bytes_files_and_tensors_are_images_too(predictor: Predictor, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    content, pixels = (tmp_path / "a.png").read_bytes(), np.array(picture())
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    with (tmp_path / "a.png").open("rb") as file:
        given = [content, bytearray(content), memoryview(content), io.BytesIO(content), file]
        singles = [predictor(one)[0] for one in given]
    arrays = [pixels[None], batch, batch[0], np.dstack([pixels, pixels[..., :1]]), pixels[..., :1], pixels[..., 0]]
    found = [*singles, *(predictor(one)[0] for one in arrays[:4]), *predictor(arrays[4:])]
    expected = predictor(picture())[0].to_coco()
    for one in found[:9]:
        assert one.to_coco() == expected
    assert all(one.size == (80, 60) for one in found)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "images: expected a path, bytes, a binary file object, .* got int"),
        (None, "images: .* got NoneType"),
        ([3.5], "image 0: expected a path, .* got float"),
        ("https://example.com/photo.jpg", "https://example.com/photo.jpg is an address, which is not read"),
        (io.StringIO("text"), "image 0: expected a file that is opened in binary mode"),
    ],
)
def test_an_image_of_a_wrong_type_is_named(image: Any, message: str, predictor: Predictor) -> None:
    with pytest.raises(ArgumentError, match=message):
        predictor(image)


@pytest.mark.parametrize(
    "options", [{"threshold": "0.5"}, {"threshold": None}, {"top_k": "3"}, {"batch_size": 0}, {"batch_size": 2.0}]
)
def test_an_option_of_a_wrong_type_is_named(options: dict[str, Any], predictor: Predictor) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(options))}: expected") as error:
        predictor(picture(), **options)
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.int64, np.uint32])
def test_arrays_of_other_whole_numbers_up_to_255_are_of_8_bits(kind: Any, predictor: Predictor) -> None:
    pixels = np.asarray(picture())
    expected = predictor(pixels)[0].to_coco()
    assert expected
    assert predictor(pixels.astype(kind))[0].to_coco() == expected
    assert predictor(torch.from_numpy(pixels.astype(np.int64)))[0].to_coco() == expected


def test_numbers_of_numpy_are_options(predictor: Predictor) -> None:
    (found,) = predictor(picture(), threshold=np.float32(0.0), batch_size=np.int64(2))
    assert len(found) == 2
    assert len(found.above(np.float32(0.5))) == len(found.above(0.5))


def test_predictions_carry_the_image_ids_that_are_given(predictor: Predictor) -> None:
    assert [one.image_id for one in predictor([picture(), picture()], image_ids=[9, 4])] == [9, 4]
    with pytest.raises(ArgumentError, match="image_ids: expected one for each of 1 images, got 2"):
        predictor(picture(), image_ids=[9, 4])


def test_wrong_starts_are_named(predictor: Predictor) -> None:
    with pytest.raises(ArgumentError, match=r"Use Predictor\.from_pretrained"):
        Predictor("runs/first")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="device: 'cuda:77' can't be used here"):
        Predictor(tiny_model(), "cuda:77")
    with pytest.raises(ArgumentError, match="expected several images, got one"):
        next(predictor.stream("photo.jpg"))


@pytest.mark.parametrize("threshold", [2, 50, float("nan"), np.float32(1.5)])
def test_a_threshold_that_is_no_score_is_refused(threshold: float, predictor: Predictor) -> None:
    with pytest.raises(ArgumentError, match=r"threshold: expected a score of at most 1, or \"auto\", got .*%"):
        predictor(picture(), threshold=threshold)


def test_arrays_of_more_bits_are_scaled_by_the_models_range(predictor: Predictor) -> None:
    pixels = np.asarray(picture())
    expected = predictor(pixels)[0].to_coco()
    assert predictor(pixels.astype(np.uint16) * 257)[0].to_coco() == expected
    with pytest.raises(ImageError, match=r"expected an array .* of uint8, got .* float32\. Scale it .* pixel_range"):
        predictor(pixels / np.float32(255))
    predictor.pixel_range = (0.0, 1.0)
    try:
        assert predictor(pixels / np.float32(255))[0].to_coco() == expected
        assert predictor(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1))[0].to_coco() == expected
        assert predictor(pixels)[0].to_coco() == expected
    finally:
        predictor.pixel_range = None


def test_images_that_can_not_be_read_are_handed_over_and_the_rest_is_predicted(
    predictor: Predictor, tmp_path: Path
) -> None:
    (tmp_path / "b.png").write_bytes(b"\x89PNG broken")
    failed: dict[int, Exception] = {}
    images: list[Any] = [picture(), tmp_path / "b.png", tmp_path / "none.png", picture()]
    found = list(predictor.stream(images, batch_size=2, unreadable=failed.__setitem__))
    assert [one.image_id for one in found] == [0, 3]
    assert [(key, type(error)) for key, error in failed.items()] == [(1, ImageError), (2, MissingImageError)]


def test_bf16_predicts_nearly_the_same_and_an_unknown_precision_is_refused() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    model = tiny_model()
    exact, half = (Predictor(model, precision=name)(image, threshold=0.0)[0] for name in ("float32", "bf16"))
    assert model.dtype == torch.float32
    assert half.scores.max() == pytest.approx(exact.scores.max(), abs=0.02)
    assert not np.array_equal(half.scores, exact.scores)
    assert np.array_equal(Predictor(model)(image, threshold=0.0)[0].scores, exact.scores), "auto, on a CPU"
    with pytest.raises(ArgumentError, match="precision: expected auto, float32, bf16, got 'half'"):
        Predictor(model, precision="half")  # type: ignore[arg-type]


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2f_trainer.inference.predictor.gpu_computes_in_bf16", lambda: False)
    assert not uses_bf16("auto", torch.device("cuda"))
    with pytest.raises(ArgumentError, match=r"this GPU has no bfloat16 units\. Use float32"):
        uses_bf16("bf16", torch.device("cuda"))


def test_bf16_is_used_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2f_trainer.inference.predictor.gpu_computes_in_bf16", lambda: True)
    assert uses_bf16("auto", torch.device("cuda"))
    assert not uses_bf16("float32", torch.device("cuda"))


def few_levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about images with few grey levels."""
    return [record.getMessage() for record in caplog.records if "grey levels" in record.getMessage()]


@pytest.mark.parametrize(
    ("kind", "scale", "pixel_range", "message"),
    [
        (
            "uint16",
            16,
            None,
            "between 0 and 4080, of which the range from 0 to 65535 leaves 17 of .*pixel_range, such as 0,4080",
        ),
        (
            "uint16",
            2,
            (0.0, 47200.0),
            "between 0 and 510, of which the range from 0 to 47200 leaves 4 of 256 .*pixel_range, such as 0,510",
        ),
        (
            "float32",
            1 / 256,
            (0.0, 47200.0),
            "between 0 and 0.996094, of which the range from 0 to 47200 leaves 1 of 256 grey levels",
        ),
        (
            "float32",
            1,
            (-900.0, -100.0),
            "between 0 and 255, of which the range from -900 to -100 leaves 1 of 256 grey levels",
        ),
    ],
)
def test_an_image_of_which_the_range_leaves_few_grey_levels_is_reported_once(
    kind: str,
    scale: float,
    pixel_range: tuple[float, float] | None,
    message: str,
    predictor: Predictor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("m2f_trainer.data.images._warned", [])
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None], 80, axis=0)
    Image.fromarray((ramp * np.float64(scale)).astype(kind)).save(tmp_path / "a.tif")
    predictor.pixel_range = pixel_range
    predictor([tmp_path / "a.tif"] * 3)
    (line,) = few_levels(caplog)
    assert re.search(rf"a\.tif: its values lie .*{message}", line), line
    predictor.pixel_range = (0.0, 255.0 * scale)
    assert predictor(tmp_path / "a.tif")[0].to_coco() == predictor(Image.fromarray(ramp))[0].to_coco()


@pytest.mark.parametrize(
    ("values", "pixel_range"),
    [
        (np.full((80, 60), 300, np.uint16), (0.0, 47200.0)),
        (np.arange(4800, dtype=np.uint16).reshape(80, 60) % 9, (0.0, 47200.0)),
        (np.asarray(np.arange(4800).reshape(80, 60) % 9 + 300, np.float32), (0.0, 1.0)),
        (np.arange(4800, dtype=np.uint16).reshape(80, 60) // 1200 * 20000, None),
        (np.arange(4800, dtype=np.uint16).reshape(80, 60) * 10, (0.0, 47200.0)),
        (np.arange(4800, dtype=np.uint16).reshape(80, 60) // 4799 * 40000, "image"),
    ],
    ids=["constant", "labels", "blank", "mask", "of the range", "scaled by itself"],
)
def test_images_that_have_few_values_and_images_of_the_range_are_not_reported(
    values: np.ndarray[Any, Any],
    pixel_range: Any,
    predictor: Predictor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("m2f_trainer.data.images._warned", [])
    predictor.pixel_range = pixel_range
    predictor(values)
    assert few_levels(caplog) == []
