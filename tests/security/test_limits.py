"""Excessive sizes in untrusted files are refused with the limit before they take memory or time."""

import base64
import io
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.doctor.pictures import MOST_DRAWN
from tests.security.conftest import Command, change


@pytest.mark.parametrize(("field", "value"), [("decoder_layers", 10**7), ("image_width", 2**20)])
def test_an_absurd_number_in_a_model_folder_is_refused(
    field: str, value: int, m2f: Command, model: Path, photo: Path, tmp_path: Path
) -> None:
    change(model / "config.json", **{field: value})
    ran = m2f("predict", model, photo, "--output_dir", tmp_path / "output")
    assert ran.status == 1
    assert f"{field} is {value}, and the limit is" in ran.err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_height": 2**20}, "image_height: expected between 1 and 16384, got 1048576"),
        ({"num_queries": 10**7}, "num_queries: expected between 1 and 10000, got 10000000"),
        ({"head_config": {"decoder_layers": 10**7}}, "decoder_layers is 10000000, and the limit is 64"),
        ({"backbone_config": {"model_type": "dinov3_vit", "num_hidden_layers": 10**7}}, "and the limit is 256"),
    ],
)
def test_an_absurd_number_in_a_recipe_is_refused(
    fields: dict[str, object], message: str, m2f: Command, recipe: Callable[..., Path]
) -> None:
    ran = m2f("train", recipe(**fields))
    assert ran.status == 1
    assert message in ran.err


def sparse_tiff(path: Path, side: int, tiled: bool) -> Path:
    """A grey TIFF of this side without any data: a few hundred bytes, whose tiles or one strip stand for zeros."""
    count = (side // 4096 + 1) ** 2 if tiled else 1
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    if tiled:
        tags += [(322, 4, 1, 4096), (323, 4, 1, 4096), (324, 4, count, 0), (325, 4, count, 0)]
    else:
        tags += [(273, 4, 1, 0), (278, 4, 1, side), (279, 4, 1, 0)]
    body = b"".join(struct.pack("<HHII", *(tag if tag[2] == 1 else (*tag[:3], 4096))) for tag in sorted(tags))
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", 0)
    path.write_bytes(header + bytes(4096 - len(header)) + bytes(64 + 4 * count if count > 1 else 0))
    return path


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("tiled", [True, False])
def test_a_sparse_tiff_of_absurd_size_is_refused(tiled: bool, m2f: Command, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    path = sparse_tiff(tmp_path / "a.tif", 500_000, tiled)
    ran = m2f("predict", model, path, "--tile", "64", "--output_dir", tmp_path / "output")
    assert ran.status == 1
    assert "expected at most 100,000,000,000 pixels, got 250,000,000,000" in ran.err


def test_a_sparse_tiff_of_one_absurd_strip_is_refused(m2f: Command, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tifffile", reason="the extra `tiff` is not installed")
    path = sparse_tiff(tmp_path / "a.tif", 60_000, tiled=False)
    ran = m2f("predict", model, path, "--tile", "64", "--output_dir", tmp_path / "output")
    assert ran.status == 1
    assert "expected at most 536,870,912 pixels in a tile or strip, got 3,600,000,000" in ran.err


def test_a_video_of_absurd_frames_is_refused(m2f: Command, model: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width = stream.height = 8192
        stream.pix_fmt = "yuvj420p"
        container.mux(stream.encode(av.VideoFrame(8192, 8192, "yuvj420p")))
        container.mux(stream.encode())
    ran = m2f("predict", model, path, "--output_dir", tmp_path / "output")
    assert ran.status == 1
    assert "expected frames of at most 37,748,736 pixels, got 8192x8192" in ran.err


def test_a_page_shows_a_bounded_number_of_objects(m2f: Command, photo: Path, tmp_path: Path) -> None:
    """Each was decoded at the size of the image: minutes for a file of two megabytes."""
    places = [(2 * (k % 60), 2 * (k // 60)) for k in range(MOST_DRAWN)]
    places += [(160 + 2 * (k % 10), 2 * (k // 10)) for k in range(100)]  # apart, on the right
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 200, "width": 200}],
        "categories": [{"id": 1, "name": "dot"}],
        "annotations": [
            {
                "id": k + 1,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "segmentation": [[x, y, x + 2, y, x + 2, y + 2]],
            }
            for k, (x, y) in enumerate(places)
        ],
    }
    for split in ("train", "valid"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        Image.new("RGB", (200, 200), "red" if split == "train" else "blue").save(folder / "a.png")
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    ran = m2f("check", tmp_path / "data", "--html", tmp_path / "page.html")
    assert f"page: {tmp_path / 'page.html'}" in ran.out
    page = (tmp_path / "page.html").read_text()
    pictures = re.findall("data:image/jpeg;base64,([^\"')]+)", page)
    assert pictures
    for encoded in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"), dtype=np.int64)
        across = pixels.shape[1] / 200
        assert np.ptp(pixels[:, : int(100 * across)], axis=(0, 1)).max() > 50, "the first objects are drawn"
        assert np.ptp(pixels[:, int(150 * across) :], axis=(0, 1)).max() < 20, "those beyond the limit are not"
