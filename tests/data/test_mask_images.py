"""Masks stored as images are read as objects, and refused where their values may be classes of pixels."""

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.mask_images import CITYSCAPES, counts_of_values
from m2f_trainer.data.validate import check_dataset, check_split
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.fix import repair
from m2f_trainer.errors import DataError
from m2f_trainer.masks import segmentation as masks
from tests.data.exports import pictures


def ids(count: int, dtype: type = np.uint8) -> np.ndarray:
    """A mask of 16 x 20 pixels with objects 1 to `count`, each 3 x 3 pixels; the first two touch."""
    values = np.zeros((16, 20), dtype)
    for k in range(count):
        values[k // 5 * 4 : k // 5 * 4 + 3, k % 5 * 4 - (k == 1) : k % 5 * 4 + 3 - (k == 1)] = k + 1
    return values


VOC_COLOURS = [[0, 0, 0], [128, 0, 0], *[[k, k, k] for k in range(2, 255)], [224, 224, 192]]


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def masked(root, counts, image="images/{}.png", mask="masks/{}.png", dtype=np.uint8):
    """Images a, b, c, ... with the given numbers of objects."""
    for name, count in zip("abcdefgh", counts, strict=False):
        pictures(root, [image.format(name)])
        save(root / mask.format(name), ids(count, dtype))
    return root


def objects(rows):
    return [[masks.decode(one["counts"], 16, 20) for one in row["objects"]] for row in rows]


@pytest.mark.parametrize(
    ("image", "mask", "dtype"),
    [
        ("images/{}.png", "masks/{}.png", np.uint8),
        ("Images/{}.png", "Labels/{}.png", np.uint16),
        ("{}.png", "{}_masks.png", np.uint16),  # Cellpose
        ("img/{}_image.png", "gt/{}_label.tif", np.int32),
        ("photos/{}.png", "instances/{}.png", np.uint8),
    ],
)
def test_each_value_of_a_mask_is_an_object(image, mask, dtype, tmp_path):
    root = masked(tmp_path / "set", (3, 5, 0), image, mask, dtype)
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert [one.name for one in categories_of(rows)] == ["object"]
    for row, found, count in zip(rows, objects(rows), (3, 5, 0), strict=True):
        assert row["image"]["path"].endswith("." + image.rpartition(".")[2])
        for value, bitmap in enumerate(found, start=1):
            assert np.array_equal(bitmap, ids(count) == value)
        assert len(found) == count
        assert all(one["area"] == 9 for one in row["objects"])


@pytest.mark.parametrize("image", [f"{{}}_{end}" for end in ("raw", "img", "image", "seg", "gt", "label", "mask")])
@pytest.mark.parametrize("mask", ["{}", "{}_mask"])
def test_a_mask_has_the_whole_name_of_its_image_or_that_with_an_ending(image, mask, tmp_path):
    root = masked(tmp_path / "set", (3, 5, 0), f"images/{image}.png", f"masks/{mask.format(image)}.png")
    found = objects(load_coco(root, cache_dir=tmp_path / "cache")["train"])
    assert list(map(len, found)) == [3, 5, 0]


def test_a_mask_of_the_whole_name_of_an_image_is_no_other_images(tmp_path):
    root = masked(tmp_path / "set", (3, 5, 4))
    masked(root, (4, 3, 6), "images/{}_seg.jpg", "masks/{}_seg.png")
    rows = load_coco(root, cache_dir=tmp_path / "cache", hold_out=False)["train"]
    found = {row["image"]["path"].rpartition("/")[2]: len(row["objects"]) for row in rows}
    assert found == {"a.png": 3, "a_seg.jpg": 4, "b.png": 5, "b_seg.jpg": 3, "c.png": 4, "c_seg.jpg": 6}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("train/images/{}.png", "train/masks/{}.png"),
        ("images/train/{}.png", "masks/train/{}.png"),
        ("train_images/{}.png", "train_masks/{}.png"),
    ],
)
def test_splits_are_the_folders_of_the_masks(image, mask, tmp_path):
    root = masked(tmp_path / "set", (3, 4), image, mask)
    masked(root, (4, 3), image.replace("train", "val"), mask.replace("train", "val"))
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2, "valid": 2}
    check_dataset(splits)


@pytest.mark.parametrize("nested", [True, False])
def test_one_mask_an_object_is_read(nested, tmp_path):
    """As in the Data Science Bowl 2018, and in one folder of masks an image."""
    root = tmp_path / "set"
    image, mask = ("stage1_train/{}/images/{}.png", "stage1_train/{}/masks/{}.png")
    image, mask = (image, mask) if nested else ("images/{1}.png", "masks/{0}/{1}.png")
    for name in ("a1", "b2") if nested else ("image_1", "raw_1", "a_label"):
        pictures(root, [image.format(name, name)])
        for value in (1, 2, 3):
            save(root / mask.format(name, f"m{value}"), np.where(ids(3) == value, 255, 0).astype(np.uint8))
    pictures(root, ["stage1_test/c3/images/c3.png"] if nested else [])
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert list(splits) == ["train"]
    for found in objects(splits["train"]):
        assert np.array_equal(found, [ids(3) == value for value in (1, 2, 3)])


@pytest.mark.parametrize("nested", [True, False])
def test_the_objects_of_an_unreadable_image_are_counted(nested, tmp_path):
    root = masked(tmp_path / "set", (3, 4, 5, 3, 4, 5))
    if nested:  # one mask an object
        for path in sorted((root / "masks").iterdir()):
            values = np.asarray(Image.open(path))
            for value in range(1, values.max() + 1):
                save(path.with_suffix("") / f"{value}.png", (values == value).astype(np.uint8))
            path.unlink()
    (root / "images/c.png").write_bytes(b"")
    repaired = repair(examine(root), tmp_path / "copy")
    for what, (kept, total) in {"images": (5, 6), "objects": (19, 24)}.items():
        found = [repaired.counts[split][what] for split in ("train", "valid")]
        assert (sum(after for _, after in found), sum(before for before, _ in found)) == (kept, total)


def test_cityscapes_has_classes_groups_and_numbered_objects(tmp_path):
    root = tmp_path / "set"
    for split in ("train", "val"):
        name = f"{split}/aachen/aachen_000000_000019"
        pictures(root / "leftImg8bit", [f"{name}_leftImg8bit.png"])
        values = np.array([0, 7, 24000, 24001, 26, 33002], np.uint16)[ids(5)]
        save(root / f"gtFine/{name}_gtFine_instanceIds.png", values)
        save(root / f"gtFine/{name}_gtFine_labelIds.png", ids(5))
        save(root / f"gtFine/{name}_gtFine_color.png", np.stack([ids(5)] * 3, axis=2))
        (root / f"gtFine/{name}_gtFine_polygons.json").write_text('{"objects": []}')
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert list(splits) == ["train", "valid"]
    assert [one.name for one in categories_of(splits["train"])] == ["person", "car", "bicycle"]
    (row,) = splits["train"]
    found = [(CITYSCAPES[one["category_id"]], one["iscrowd"], one["area"]) for one in row["objects"]]
    assert found == [("car", True, 9), ("person", False, 9), ("person", False, 9), ("bicycle", False, 9)]


def semantic(kind):
    """Masks whose values may be classes."""
    yield from {
        "binary": ((ids(5) > 0).astype(np.uint8) * 255, (ids(3) > 0).astype(np.uint8) * 255),
        "scattered": (ids(9) % 4, ids(7) % 4),
        "few values": (ids(2), ids(1)),
        "same values everywhere": (ids(3), ids(3)),
    }[kind]


@pytest.mark.parametrize("kind", ["binary", "scattered", "few values", "same values everywhere"])
def test_values_that_may_be_classes_are_refused_unless_they_are_said_to_be_instances(kind, tmp_path):
    for folder in ("masks", "instances"):
        for name, values in zip("ab", semantic(kind), strict=True):
            pictures(tmp_path / folder / "set", [f"images/{name}.png"])
            save(tmp_path / folder / "set" / folder / f"{name}.png", values)
    with pytest.raises(DataError, match=r"may be classes of pixels.*name the folder of the masks `instances`"):
        load_coco(tmp_path / "masks/set", cache_dir=tmp_path / "cache")
    assert load_coco(tmp_path / "instances/set", cache_dir=tmp_path / "cache")["train"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "masks/b.png").unlink(), "b.png: found no mask of this image"),
        (lambda root: (root / "images/b.png").unlink(), "1 masks have no image of their name: masks/b.png"),
        (lambda root: save(root / "masks/b.png", ids(4)[:, :10]), "expected 20x16 pixels as its image, got 10x16"),
        (
            lambda root: save(root / "masks/b.png", np.stack([ids(4), ids(4), ids(3)], axis=2)),
            "expected one channel .* got 3 channels that differ",
        ),
        (lambda root: (root / "masks/b.png").write_bytes(b"no image"), "not an image of a known format"),
        (lambda root: save(root / "instances/b.png", ids(4)), "found 2 masks of its name"),
    ],
)
def test_masks_that_fit_no_image_are_refused(spoil, message, tmp_path):
    root = masked(tmp_path / "set", (3, 4, 5))
    spoil(root)
    with pytest.raises(DataError, match=message):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert examine(root).status


SPELLINGS = {
    "grey with alpha": lambda values: np.stack([values, np.full_like(values, 255)], axis=2),
    "three equal channels": lambda values: np.stack([values] * 3, axis=2),
    "RGBA": lambda values: np.stack([*[values] * 3, np.full_like(values, 255)], axis=2),
    "floats of ImageJ": lambda values: values.astype(np.float32),
    "ids beyond 10 ** 9": lambda values: np.where(values > 0, values.astype(np.int32) + 2_000_000_000, 0),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_ids_are_read_in_every_unambiguous_spelling(name, tmp_path):
    root = masked(tmp_path / "set", (3, 5, 0), mask="masks/{}.tif")
    for file, count in zip("abc", (3, 5, 0), strict=True):
        save(root / f"masks/{file}.tif", SPELLINGS[name](ids(count)))
    found = objects(load_coco(root, cache_dir=tmp_path / "cache")["train"])
    assert list(map(len, found)) == [3, 5, 0]
    assert all(np.array_equal(bitmap, ids(5) == value) for value, bitmap in enumerate(found[1], start=1))


@pytest.mark.parametrize("folder", ["masks", "instances"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda values: np.where(values > 0, values.astype(np.int32), -1), "-1"),
        (lambda values: values.astype(np.float32) / 2, "0.5"),
        (lambda values: np.where(values == 2, np.nan, values.astype(np.float32)), "nan"),
        (lambda values: np.where(values == 2, np.inf, values.astype(np.float32)), "inf"),
    ],
)
def test_values_that_are_no_ids_are_refused_with_the_file_and_the_value(folder, change, found, tmp_path):
    root = masked(tmp_path / "set", (3, 5, 4), mask=folder + "/{}.tif", dtype=np.int32)
    save(root / folder / "b.tif", change(ids(5)).astype(np.int32 if found == "-1" else np.float32))
    with pytest.raises(DataError, match=rf"b\.tif: expected whole numbers from 0 as values, .* got {found}\. Save"):
        load_coco(root, cache_dir=tmp_path / "cache")
    assert {one.kind for one in examine(root).findings if one.severity == "error"} >= {"bad-mask"}


def test_the_void_border_of_pascal_voc_is_no_object(tmp_path, caplog):
    root = masked(tmp_path / "set", (3, 5), mask="instances/{}.png")
    for name, count in (("a", 3), ("b", 5)):
        values = ids(count)
        values[15] = 255
        image = Image.fromarray(values)
        image.putpalette([value for colour in VOC_COLOURS for value in colour] if name == "a" else [*range(256)] * 3)
        image.save(root / f"instances/{name}.png")
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert [len(row["objects"]) for row in rows] == [3, 6], "255 of another palette may be an object"
    assert "void border of Pascal VOC in a mask (1), the first: " in caplog.text
    assert "a.png: 20 pixels of the value 255 in Pascal VOC's palette are taken as background" in caplog.text


def test_255_is_an_object_where_it_is_the_only_value(tmp_path):
    root = tmp_path / "set"
    pictures(root, ["a/images/a.png", "b/images/b.png"])
    for name in ("a", "b"):
        for k in (1, 2):
            (root / name / "masks").mkdir(exist_ok=True)
            image = Image.fromarray(np.where(ids(2) == k, 255, 0).astype(np.uint8))
            image.putpalette([value for c in VOC_COLOURS for value in c])
            image.save(root / f"{name}/masks/{k}.png")
    rows = load_coco(root, cache_dir=tmp_path / "cache")["train"]
    assert [len(row["objects"]) for row in rows] == [2, 2]


def test_black_is_the_background_of_palette_images_of_ids(tmp_path):
    """Pillow's `quantize` gives the index 0 to the lightest colour, here an object."""
    root = masked(tmp_path / "set", (3, 5, 4), mask="instances/{}.png")
    for name, count in zip("abc", (3, 5, 4), strict=True):
        image = Image.fromarray(ids(count) * 40).quantize(count + 1)
        assert np.asarray(image)[15, 19] != 0, "the background"
        image.save(root / f"instances/{name}.png")
    for found, count in zip(objects(load_coco(root, cache_dir=tmp_path / "cache")["train"]), (3, 5, 4), strict=True):
        assert {bitmap.tobytes() for bitmap in found} == {
            (ids(count) == value).astype(np.uint8).tobytes() for value in range(1, count + 1)
        }


PALETTES = {
    "quantize": lambda mask: mask.quantize(2),
    "adaptive": lambda mask: mask.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=2),
    "red and black": lambda mask: with_palette(mask.point(lambda value: value == 0), [255, 0, 0, 0, 0, 0]),
    "two blacks": lambda mask: with_palette(mask.point(lambda value: 0 if value else 2), [0, 9, 0, *[0] * 6]),
    "black and white": lambda mask: with_palette(mask.point(bool), [0, 0, 0, 255, 255, 255]),
    "black and transparent": lambda mask: with_palette(mask.point(bool), [255, 255, 255, 0, 0, 0], clear=0),
    "MorphoLibJ": lambda mask: with_palette(mask.point(bool), [255] * 3 + [k // 3 for k in range(765)]),
    "ImageJ, inverted": lambda mask: with_palette(mask, [255 - k // 3 for k in range(768)]),
}


def with_palette(image, colours, clear=None):
    """The image with a palette, in which the index `clear` is transparent."""
    image.putpalette(colours)
    if clear is not None:
        image.info["transparency"] = clear
    return image


@pytest.mark.parametrize("name", PALETTES)
def test_black_is_the_background_of_palette_images_of_one_object(name, tmp_path):
    root = tmp_path / "set"
    pictures(root, ["images/a.png"])
    for value in (1, 2):
        (root / "masks/a").mkdir(parents=True, exist_ok=True)
        image = PALETTES[name](Image.fromarray(np.where(ids(2) == value, 255, 0).astype(np.uint8)))
        assert image.mode == "P"
        image.save(root / f"masks/a/{value}.png")
    (found,) = objects(load_coco(root, cache_dir=tmp_path / "cache")["train"])
    assert np.array_equal(found, [ids(2) == value for value in (1, 2)])


def test_a_file_of_several_masks_is_refused(tmp_path):
    root = masked(tmp_path / "set", (3, 4, 5), mask="masks/{}.tif")
    first = Image.fromarray(ids(3))
    first.save(root / "masks/b.tif", save_all=True, append_images=[Image.fromarray(ids(4))])
    with pytest.raises(DataError, match="got several pages of one size"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_a_mask_that_leads_out_of_the_folder_is_not_read(tmp_path):
    root = masked(tmp_path / "set", (3, 4, 5))
    (root / "masks/b.png").rename(tmp_path / "secret.png")
    (root / "masks/b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="leads out of"):
        load_coco(root, cache_dir=tmp_path / "cache")


def test_run_lengths_of_values_equal_those_of_each_bitmap(tmp_path):
    generator = np.random.default_rng(0)
    for _ in range(20):
        values = generator.integers(0, 5, size=generator.integers(1, 9, 2)).astype(np.uint16)
        found = dict(counts_of_values(values))
        assert set(found) == set(np.unique(values)) - {0}
        assert all(counts == masks.encode(values == value) for value, counts in found.items())


@pytest.mark.parametrize("orientation", [6, 1])
def test_masks_of_a_photo_as_viewers_show_it_turn_the_photo_or_are_refused(orientation, tmp_path):
    root = masked(tmp_path / "set", (3, 4), image="images/{}.jpg")
    exif = Image.Exif()
    exif[0x112] = orientation
    for name in "ab":
        with Image.open(root / f"images/{name}.jpg") as photo:
            photo.transpose(Image.Transpose.ROTATE_90).save(root / f"images/{name}.jpg", exif=exif)
    splits = load_coco(root, cache_dir=tmp_path / "cache")
    assert [(row["height"], row["width"]) for row in splits["train"]] == [(16, 20)] * 2
    if orientation == 6:
        check_split(splits, "train")
    else:
        with pytest.raises(DataError, match="expected 20x16 pixels"):
            check_split(splits, "train")
