"""Read and write videos with PyAV (the libraries of FFmpeg)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2f_trainer.errors import ImageError, needs

MOST_PIXELS = 8192 * 4608  # of a frame: 8K video has 7680 x 4320 or 8192 x 4320
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


@contextmanager
def open_video(path: Path) -> Iterator[Any]:
    """The PyAV container of a video.

    Raises:
        ImageError: no video can be read from the file.
        MissingPackageError: PyAV is missing.
    """
    needs("av", extra="video")
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ImageError(f"{path}: the file contains no video stream.")
            context = container.streams.video[0].codec_context
            check_frame(context.width, context.height, path)
            yield container
    except (av.error.FFmpegError, OSError) as error:
        raise ImageError(f"{path}: the video can't be read ({error}). Convert it to MP4 first.") from error


def check_frame(width: int, height: int, path: Path) -> None:
    """Raise ImageError for frames of more than `MOST_PIXELS`; a file of a few kilobytes can contain thousands."""
    if width * height > MOST_PIXELS:
        raise ImageError(
            f"{path}: expected frames of at most {MOST_PIXELS:,} pixels, got {width}x{height}. Scale the video down, "
            "or predict its frames as images with --tile."
        )


def frames(path: Path) -> Iterator[Image.Image]:
    """The frames of a video in RGB, rotated as players do, one in memory at a time.

    Raises:
        ImageError: no video can be read from the file, or no frame can be decoded.
        MissingPackageError: PyAV is missing.
    """
    frame: Any = None
    with open_video(path) as container:
        for frame in container.decode(video=0):
            check_frame(frame.width, frame.height, path)  # a stream may change its size
            yield frame.to_image().rotate(frame.rotation, expand=True)
    if frame is None:
        raise ImageError(f"{path}: no frame can be decoded: the video is empty or cut off. Copy the file again.")


def frame_rate(path: Path) -> Fraction:
    """Frames per second; 25 if the file doesn't record it. Raises as `open_video`."""
    with open_video(path) as container:
        return Fraction(container.streams.video[0].average_rate or 25)


def write_video(pictures: Iterable[Image.Image], path: Path, rate: Fraction) -> None:
    """Write pictures of equal size as an MP4 (H.264), at least one; after an error nothing is left.

    The format needs even sides: an odd last row or column is cut.
    """
    import av

    unfinished = path.with_name(f".{path.name}")
    unfinished.unlink(missing_ok=True)  # of a killed prediction, or a link
    try:
        with av.open(str(unfinished), "w", format="mp4") as container:
            stream: Any = None
            for picture in pictures:
                width, height = picture.width // 2 * 2, picture.height // 2 * 2
                if stream is None:
                    stream = container.add_stream("libx264", rate=rate)
                    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                frame = av.VideoFrame.from_ndarray(np.asarray(picture)[:height, :width].copy(), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
