"""The frame of annotations and the range of pixel values: detected or given, and used everywhere."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from m2f_trainer.cli.main import main
from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.hub_dataset import load_hub, load_recipe_dataset
from m2f_trainer.data.images import open_image
from m2f_trainer.data.reading import Reading, reading_of
from m2f_trainer.data.transforms import EvalTransform, read_image
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.doctor.scan import Settings
from m2f_trainer.errors import DataError, ImageError, RecipeError
from m2f_trainer.inference.windows import open_windows
from tests.data.test_hub_dataset import as_pushed

CORNER = [[2, 2, 10, 2, 10, 8, 2, 8]]  # the bright object as viewers show it, in no turn or mirror image of itself


def photo(size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A dark photo (H, W, 3) with a bright corner, as viewers show it."""
    pixels = np.full((*size, 3), 20, np.uint8)
    pixels[2:8, 2:10] = 230
    return pixels


def save_turned(shown: np.ndarray[Any, Any], path: Path, orientation: int) -> None:
    """A file that viewers show as `shown`, stored in the way that its EXIF orientation undoes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for method in [None, *Image.Transpose]:
        image = Image.fromarray(shown) if method is None else Image.fromarray(shown).transpose(method)
        image.save(path, exif=exif)
        with Image.open(path) as stored:
            if np.array_equal(np.asarray(ImageOps.exif_transpose(stored)), shown):
                return
    raise AssertionError(orientation)


def dataset(
    root: Path, orientations: list[int], sizes: list[tuple[int, int]], outlines: Any = None, form: str = "png"
) -> Path:
    """Photos with one object each; width and height are those that viewers show."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for k, (orientation, size) in enumerate(zip(orientations, sizes, strict=True)):
        save_turned(photo(size), root / f"images/{k}.{form}", orientation)
        images.append({"id": k, "file_name": f"{k}.{form}", "height": size[0], "width": size[1]})
        outline = outlines[k] if outlines else CORNER
        annotations.append({"id": k, "image_id": k, "category_id": 1, "segmentation": outline, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def is_on_object(row: dict[str, Any]) -> bool:
    """Whether the mask of a row lies on the bright pixels of its image, as training and evaluation see it."""
    sample = EvalTransform(*(-(-side // 4) * 4 for side in (row["height"], row["width"])))(row)
    bright = sample["pixel_values"].float().mean(dim=0).numpy() > 125
    mask = np.zeros_like(bright)
    x0, y0, x1, y1 = sample["boxes"][0].tolist()
    mask[y0:y1, x0:x1] = sample["masks"][0] != 0
    return bool((mask == bright).all())


SQUARE, WIDE = (24, 24), (20, 32)
FRAMES = ("displayed", "stored")


@pytest.mark.parametrize("form", ["png", "tif"])
@pytest.mark.parametrize(
    ("orientation", "size"), [(3, WIDE), (2, WIDE), (4, WIDE), (6, SQUARE), (8, SQUARE), (5, SQUARE)]
)
def test_a_frame_that_sizes_do_not_tell_is_asked_for_and_then_followed(orientation, size, form, tmp_path):
    root = dataset(tmp_path / "set", [orientation] * 5, [size] * 5, form=form)
    with pytest.raises(DataError, match=r"image 0 .*EXIF orientation.*--exif_frame displayed .*--exif_frame stored"):
        load_coco(root, cache_dir=tmp_path / "cache")
    rows = load_coco(root, cache_dir=tmp_path / "cache", exif_frame="displayed")["train"]
    assert all(is_on_object(row) for row in rows)
    rows = load_coco(root, cache_dir=tmp_path / "cache", exif_frame="stored")["train"]
    assert not any(is_on_object(row) for row in rows)
    kinds = {
        frame: {one.kind for one in examine(root, Settings(64, 64, exif_frame=frame)).findings} for frame in FRAMES
    }
    assert "turned-image" in kinds["displayed"] - kinds["stored"]
    assert "exif-rotation" in kinds["stored"] - kinds["displayed"]


@pytest.mark.parametrize("form", ["png", "tif"])
def test_the_frame_that_some_sizes_tell_is_that_of_all_photos(form, tmp_path):
    root = dataset(tmp_path / "set", [6, 1, 3, 8, 6], [WIDE, WIDE, WIDE, SQUARE, SQUARE], form=form)
    assert all(is_on_object(row) for row in load_coco(root, cache_dir=tmp_path / "cache")["train"])
    assert examine(root, Settings(64, 64)).status == 0


def test_photos_without_objects_need_no_frame(tmp_path):
    root = dataset(tmp_path / "set", [1, 3, 1, 1, 1], [WIDE] * 5)
    content = json.loads((root / "annotations.json").read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 1]
    (root / "annotations.json").write_text(json.dumps(content))
    assert len(load_coco(root, cache_dir=tmp_path / "cache")["train"]) == 4


def test_check_asks_for_the_frame_and_its_copy_keeps_it(tmp_path, capsys):
    root = dataset(tmp_path / "set", [3] * 6, [WIDE] * 6)
    assert main(["check", str(root)]) == 1
    assert "--exif_frame displayed" in capsys.readouterr().out
    assert main(["check", str(root), "--exif_frame", "displayed", "--fix", str(tmp_path / "copy")]) == 0
    assert f"--dataset_name {tmp_path / 'copy'} --exif_frame displayed" in capsys.readouterr().out
    rows = load_coco(tmp_path / "copy", cache_dir=tmp_path / "cache", exif_frame="displayed")["train"]
    assert all(is_on_object(row) for row in rows)


def test_a_yolo_photo_that_viewers_turn_is_read_in_the_frame_that_is_given(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"images/{split}").mkdir(parents=True)
        (tmp_path / f"labels/{split}").mkdir(parents=True)
        save_turned(photo(WIDE), tmp_path / f"images/{split}/{split}.png", 6)
        corner = " ".join(f"{value / (20 if k % 2 else 32)}" for k, value in enumerate(CORNER[0]))
        (tmp_path / f"labels/{split}/{split}.txt").write_text(f"0 {corner}\n")
    (tmp_path / "data.yaml").write_text("names: [cell]\ntrain: images/train\nval: images/valid\n")
    with pytest.raises(DataError, match="--exif_frame displayed"):
        load_coco(tmp_path, cache_dir=tmp_path / "cache")
    rows = load_coco(tmp_path, cache_dir=tmp_path / "cache", exif_frame="displayed")["train"]
    assert (rows[0]["height"], rows[0]["width"]) == WIDE
    assert is_on_object(rows[0])


@pytest.mark.parametrize(("frame", "size"), [("displayed", (20, 32)), ("stored", (32, 20))])
def test_a_size_that_annotations_lack_is_that_of_the_given_frame(frame, size, tmp_path):
    root = dataset(tmp_path / "set", [6] * 5, [WIDE] * 5)
    content = json.loads((root / "annotations.json").read_text())
    for image in content["images"]:
        del image["height"], image["width"]
    (root / "annotations.json").write_text(json.dumps(content))
    row = load_coco(root, cache_dir=tmp_path / "cache", exif_frame=frame)["train"][0]
    assert (row["height"], row["width"]) == size
    assert is_on_object(row) == (frame == "displayed")


# values of more than 8 bits


def png_of_16_bits(values: np.ndarray[Any, Any]) -> bytes:
    """A PNG of 16-bit colours, which Pillow can't write; values (H, W, 3 or 4)."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def ramp(low: int, high: int, dtype: type = np.uint16) -> np.ndarray[Any, Any]:
    """Values from `low` to `high` (20, 32), with a bright corner."""
    values = np.linspace(low, low + 0.4 * (high - low), 640).reshape(20, 32)
    values[2:8, 2:10] = high
    return values.astype(dtype)


def deep_dataset(root: Path, arrays: list[np.ndarray[Any, Any]], suffix: str = "png") -> Path:
    dataset(root, [1] * len(arrays), [WIDE] * len(arrays))
    for k, array in enumerate(arrays):
        (root / f"images/{k}.png").unlink()
        if array.ndim == 3:
            (root / f"images/{k}.{suffix}").write_bytes(png_of_16_bits(array))
        else:
            Image.fromarray(array).save(root / f"images/{k}.{suffix}")
    file = root / "annotations.json"
    file.write_text(file.read_text().replace(".png", f".{suffix}"))
    return root


def levels(row: dict[str, Any]) -> int:
    return len(np.unique(np.asarray(read_image(row))))


@pytest.mark.parametrize(
    ("low", "high", "dtype", "suffix"),
    [
        (0, 4094, np.uint16, "png"),
        (51241, 52140, np.uint16, "tif"),
        (0, 1, np.float32, "tif"),
        (-1000, 3000, np.int32, "tif"),
    ],
)
def test_the_range_of_the_training_images_is_found_and_keeps_their_levels(low, high, dtype, suffix, tmp_path):
    root = deep_dataset(tmp_path / "set", [ramp(low, high, dtype)] * 5, suffix)
    row = load_coco(root, cache_dir=tmp_path / "cache")["train"][0]
    found = reading_of(row).pixel_range
    assert found == pytest.approx((low, high), abs=0.01 * (high - low))
    assert levels(row) > 90
    assert is_on_object(row)


def as_form(root: Path, form: str) -> Path:
    """A dataset of `deep_dataset` in another format, with the same annotations."""
    if form == "imagefolder":
        objects = [{"category": "cell", "segmentation": CORNER}]
        lines = [json.dumps({"file_name": path.name, "objects": objects}) for path in (root / "images").iterdir()]
        (root / "images/metadata.jsonl").write_text("\n".join(lines))
    if form == "YOLO":
        (root / "data.yaml").write_text("train: images\nval: images\nnames: [cell]\n")
        (root / "labels").mkdir()
        for path in (root / "images").iterdir():
            (root / f"labels/{path.stem}.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5")
    if form != "COCO":
        (root / "annotations.json").unlink()
    return root


@pytest.mark.parametrize("form", ["COCO", "imagefolder", "YOLO"])
def test_the_range_is_found_anew_where_images_are_replaced_by_others_of_the_same_names_and_bytes(form, tmp_path):
    root = as_form(deep_dataset(tmp_path / "set", [ramp(0, 4000)] * 5, "tif"), form)
    first, again = (load_coco(root, cache_dir=tmp_path / "cache")["train"] for _ in range(2))
    assert first.cache_files == again.cache_files
    assert reading_of(first[0]).pixel_range == pytest.approx((0, 4000), abs=40)
    for path in sorted((root / "images").glob("*.tif")):
        size = path.stat().st_size
        Image.fromarray(ramp(0, 4000) * 16).save(path)
        assert path.stat().st_size == size
    row = load_coco(root, cache_dir=tmp_path / "cache")["train"][0]
    assert reading_of(row).pixel_range == pytest.approx((0, 64000), abs=640)


def test_two_numbers_percentiles_or_the_full_range_are_used_as_given(tmp_path):
    values = ramp(0, 4094)
    root = deep_dataset(tmp_path / "set", [values, values // 8, values, values, values])

    def shown(pixel_range: Any, number: int) -> Any:
        splits = load_coco(root, cache_dir=tmp_path / "cache", pixel_range=pixel_range, hold_out=False)
        return np.asarray(read_image(splits["train"][number]))[..., 0]

    assert np.array_equal(shown((0, 4095), 0), np.rint(values / 4095 * 255))
    assert shown((0, 4095), 1).max() < 40
    assert shown("image", 1).max() == 255
    assert shown((0, 65535), 0).max() == 16


def test_all_16_bits_of_colours_are_read(tmp_path):
    values = np.stack([ramp(100, 400), ramp(300, 900), ramp(0, 4000)], axis=-1)
    for name, data in {"rgb": values, "rgba": np.concatenate([values, values[..., :1]], axis=-1)}.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(png_of_16_bits(data))
        expected = np.rint(np.clip(values / 4000 * 255, 0, 255))
        assert np.array_equal(np.asarray(open_image(path, "a", pixel_range=(0, 4000))), expected), name
    tifffile = pytest.importorskip("tifffile")
    for options in ({"byteorder": "<"}, {"byteorder": ">"}, {"compression": "zlib"}):
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", **options)
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif", "a", pixel_range=(0, 4000))), expected)
    tifffile.imwrite(tmp_path / "b.tif", np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match=r"stored one after the other.*interleaved"):
        open_image(tmp_path / "b.tif", "b")


def test_colours_of_16_bits_that_use_few_values_get_their_range(tmp_path):
    values = np.stack([ramp(0, 2000)] * 3, axis=-1)
    row = load_coco(deep_dataset(tmp_path / "set", [values] * 5), cache_dir=tmp_path / "cache")["train"][0]
    assert levels(row) > 90


@pytest.mark.parametrize(("channels", "message"), [(5, "got 5 channels"), (8, "got 8 channels")])
def test_more_than_four_channels_are_refused_with_what_to_do(channels, message, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = np.zeros((channels, 20, 32), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="separate")
    with pytest.raises(ImageError, match=rf"one channel, or of three or four .*{message}\. Save"):
        open_image(tmp_path / "a.tif", "a")
    interleaved = np.moveaxis(values, 0, -1)
    tifffile.imwrite(tmp_path / "c.tif", interleaved, photometric="rgb", extrasamples=(0,) * (channels - 3))
    with pytest.raises(ImageError, match=message):
        open_image(tmp_path / "c.tif", "c")
    for name in ("a.tif", "c.tif"):
        with pytest.raises(ImageError, match=message):
            open_windows(tmp_path / name)
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="minisblack")
    with pytest.raises(ImageError, match="got several pages of one size"):
        open_image(tmp_path / "b.tif", "b")


def test_images_of_8_bits_are_read_as_they_are_whatever_the_range(tmp_path):
    root = dataset(tmp_path / "set", [1] * 5, [WIDE] * 5)
    plain = load_coco(root, cache_dir=tmp_path / "cache")["train"][0]
    assert reading_of(plain) == Reading()
    ranged = load_coco(root, cache_dir=tmp_path / "cache", pixel_range=(0, 4095))["train"][0]
    assert read_image(ranged).tobytes() == read_image(plain).tobytes()


def test_check_proposes_the_range_and_warns_of_images_that_lose_levels(tmp_path):
    noise = np.random.default_rng(0)
    arrays = [ramp(0, 4094) + noise.integers(0, 900, (20, 32)).astype(np.uint16) for _ in range(5)]
    root = deep_dataset(tmp_path / "set", [np.minimum(array, 4094) for array in arrays])
    found = {one.kind: one for one in examine(root, Settings(64, 64)).findings}
    assert "17 grey levels" in found["pixel-range"].message or "16 grey levels" in found["pixel-range"].message
    assert "--pixel_range" in found["pixel-range"].message
    assert "few-levels" not in found
    full = {one.kind: one for one in examine(root, Settings(64, 64, pixel_range="0,65535")).findings}
    assert sum(one.count for kind, one in full.items() if kind == "few-levels") >= 4
    assert "--pixel_range image" in next(one.to_json()["remedy"] for kind, one in full.items() if kind == "few-levels")
    repaired = repair(examine(root, Settings(64, 64)), tmp_path / "copy")
    assert not any(ids for lost in repaired.left_out.values() for ids in lost.values())


def test_the_range_of_a_hub_dataset_is_found_and_kept(tmp_path):
    splits = load_coco(deep_dataset(tmp_path / "set", [ramp(0, 4094)] * 10), cache_dir=tmp_path / "cache")
    folder = as_pushed(splits, tmp_path / "pushed")
    rows = load_hub(folder, cache_dir=str(tmp_path / "hub"))["train"]
    assert reading_of(rows[0]) == reading_of(splits["train"][0])
    old = {name: rows.remove_columns(["displayed", "pixel_range"]) for name, rows in splits.items()}
    folder = as_pushed(datasets.DatasetDict(old), tmp_path / "old")
    rows = load_hub(folder, cache_dir=str(tmp_path / "hub"))["train"]
    assert levels(rows[0]) > 90


@pytest.mark.parametrize("text", ["high", "5", "9,3", "1,2,3", "nan,3", "0,inf", ""])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(RecipeError, match="pixel_range: expected auto, image, or the values of black and white"):
        load_recipe(["--dataset_name", "a", "--pixel_range", text])


# links and large images


def linked(folder: Path, root: Path, name: str = "0.png") -> Path:
    """Replace an image of a dataset by a link to a file beside the dataset."""
    (folder / "store").mkdir()
    (root / "images" / name).rename(folder / "store" / name)
    (root / "images" / name).symlink_to(folder / "store" / name)
    return root


def test_links_out_of_the_folder_are_followed_where_that_is_asked_for(tmp_path, capsys):
    root = linked(tmp_path, dataset(tmp_path / "set", [1] * 5, [WIDE] * 5))
    with pytest.raises(DataError, match=r"leads out of .* If it is a link of your own, give --follow_links"):
        load_coco(root, cache_dir=tmp_path / "cache")
    splits = load_coco(root, cache_dir=tmp_path / "cache", follow_links=True)
    rows = [row for rows in splits.values() for row in rows]
    assert len(rows) == 5
    assert all(is_on_object(row) for row in rows)
    assert main(["check", str(root)]) == 1
    assert main(["check", str(root), "--follow_links"]) == 0
    assert capsys.readouterr().out.endswith(f"m2f train --dataset_name {root} --follow_links\n")
    recipe = load_recipe(["--dataset_name", str(root), "--follow_links"])
    assert len(load_recipe_dataset(vars(recipe.data))["train"]) == 4


def test_a_name_that_leads_out_of_the_folder_is_refused_whatever_links_may_do(tmp_path):
    root = dataset(tmp_path / "set", [1] * 5, [WIDE] * 5)
    (root / "images/0.png").rename(tmp_path / "0.png")
    file = root / "annotations.json"
    file.write_text(file.read_text().replace('"0.png"', '"../../0.png"'))
    with pytest.raises(DataError, match=r"without '\.\.'"):
        load_coco(root, cache_dir=tmp_path / "cache", follow_links=True)


def test_links_that_lead_nowhere_or_to_themselves_are_missing_images(tmp_path):
    for number, target in enumerate(("0.png", "none.png", "/dev/zero")):
        root = dataset(tmp_path / f"set{number}", [1] * 5, [WIDE] * 5)
        (root / "images/0.png").unlink()
        (root / "images/0.png").symlink_to(target)
        settings = Settings(64, 64, follow_links=True)
        kinds = {one.kind for one in examine(root, settings).findings if one.severity == "error"}
        assert kinds & {"missing-image", "bad-image"}, target
        assert kinds <= {"missing-image", "bad-image", "missing-split"}, target


def test_the_limit_of_pixels_is_named_and_can_be_raised(tmp_path, monkeypatch, capsys):
    root = dataset(tmp_path / "set", [1] * 5, [WIDE] * 5)
    monkeypatch.setenv("M2F_MAX_PIXELS", "600")
    message = r"640 pixels, more than the limit of 600\. .* raise the limit with --max_pixels"
    with pytest.raises(DataError, match=message):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert main(["check", str(root), "--max_pixels", "640"]) == 0
    assert capsys.readouterr().out.endswith(f"m2f train --dataset_name {root} --max_pixels 640\n")
    monkeypatch.setenv("M2F_MAX_PIXELS", "600")
    recipe = load_recipe(["--dataset_name", str(root), "--max_pixels", "640"])
    assert len(load_recipe_dataset(vars(recipe.data))["train"]) == 4
    with pytest.raises(RecipeError, match="max_pixels: expected between 1 and 2147483647"):
        load_recipe(["--dataset_name", "a", "--max_pixels", "3000000000"])


def test_an_image_beyond_pillows_own_limit_is_read_where_the_limit_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    monkeypatch.setattr("m2f_trainer.data.images.MAX_PIXELS", 300)
    monkeypatch.setenv("M2F_MAX_PIXELS", "300")
    Image.fromarray(photo(WIDE)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"expected at most 300 pixels .* --max_pixels"):
        open_image(tmp_path / "a.png", "a")
    monkeypatch.setenv("M2F_MAX_PIXELS", "640")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png", "a")), photo(WIDE))
    assert Image.MAX_IMAGE_PIXELS == 300
