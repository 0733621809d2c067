"""Videos: read upright, written, and refused."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.errors import ImageError
from m2f_trainer.inference.video import frame_rate, frames, write_video

pytest.importorskip("av", reason="the extra `video` is not installed")


def test_a_video_that_a_telephone_took_upright_is_read_upright(tmp_path: Path) -> None:
    """Telephones store it lying, with a matrix in the track's header that says how to turn it."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:16, :16] = 255
    path = tmp_path / "clip.mp4"
    write_video((Image.fromarray(pixels) for _ in range(2)), path, Fraction(10))
    content = path.read_bytes()
    matrix = content.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2; 16.16 and 2.30 fixed point
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(content[:matrix] + quarter + content[matrix + len(quarter) :])
    frame = next(frames(path))
    assert frame.size == (48, 64)
    corners = {
        place: np.asarray(frame.crop(box)).mean() > 128
        for place, box in {"top left": (0, 0, 8, 8), "top right": (40, 0, 48, 8), "bottom left": (0, 56, 8, 64)}.items()
    }
    assert corners == {"top left": False, "top right": True, "bottom left": False}


def test_a_written_video_is_read_again_with_its_rate_and_without_an_odd_last_row(tmp_path: Path) -> None:
    shades = [40, 120, 200]
    pictures = (Image.new("RGB", (65, 49), (shade, shade, shade)) for shade in shades)
    write_video(pictures, tmp_path / "clip.mp4", Fraction(30000, 1001))
    found = list(frames(tmp_path / "clip.mp4"))
    assert [frame.size for frame in found] == [(64, 48)] * 3
    assert [np.asarray(frame).mean() for frame in found] == pytest.approx(shades, abs=4)
    assert frame_rate(tmp_path / "clip.mp4") == Fraction(30000, 1001)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"], "no unfinished file is left"


def test_a_file_that_is_no_video_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"not a video")
    with pytest.raises(ImageError, match=r"clip\.mp4: the video can't be read .* Convert it to MP4 first"):
        next(frames(tmp_path / "clip.mp4"))
