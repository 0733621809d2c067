"""Wall-clock time, CPU time and peak memory of `m2f check` by number of images.

    python -m benchmarks.check --folder /tmp/check [--photos 1250 5000] [--copies 2000 8000]

Photos are distinct JPEG files of 640 x 480 pixels and about 150 kB, with 7 polygons of 8 to 40 points each, as in COCO.
Copies are one image of 20 x 16 pixels with one object under many names, so that each is a duplicate of all others. The
command runs in a fresh process; `growth` is the exponent of the CPU time, as a power of the number of images, between
this row and the one before.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.data_index import CLASSES, annotation
from benchmarks.measure import parser, report

OBJECTS = 7
SQUARE = {"segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]], "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0}


def write_photos(root: Path, images: int) -> None:
    """Distinct photos: coarse noise for shapes, fine noise for texture."""
    rng = np.random.default_rng(0)
    for k in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        shapes = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32)
        texture = rng.normal(0, 16, (480, 640, 1)).astype(np.float32)
        pixels = (shapes + texture).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(image_path(root, k, ".jpg"), quality=90)
    shapes_of = [{**annotation(rng), "image_id": k} for k in range(images) for _ in range(OBJECTS)]
    write_annotations(root, images, ".jpg", (480, 640), shapes_of)


def write_copies(root: Path, images: int) -> None:
    """One image under many names."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    for k in range(images):
        Image.fromarray(pixels).save(image_path(root, k, ".png"))
    write_annotations(
        root, images, ".png", (16, 20), [{**SQUARE, "image_id": k, "category_id": 1} for k in range(images)]
    )


def split_of(number: int) -> str:
    """Every fifth image is for validation."""
    return "train" if number % 5 else "valid"


def image_path(root: Path, number: int, suffix: str) -> Path:
    """The path of an image; its folder is created."""
    folder = root / split_of(number)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{number}{suffix}"


def write_annotations(
    root: Path, images: int, suffix: str, size: tuple[int, int], entries: list[dict[str, Any]]
) -> None:
    """Write the annotation files of both splits."""
    categories = [{"id": key, "name": f"class {key}"} for key in range(1, CLASSES + 1)]
    for split in ("train", "valid"):
        mine = [k for k in range(images) if split_of(k) == split]
        listed = [{"id": k, "file_name": f"{k}{suffix}", "height": size[0], "width": size[1]} for k in mine]
        numbered = [{**one, "id": n} for n, one in enumerate(entries) if split_of(one["image_id"]) == split]
        content = {"images": listed, "annotations": numbered, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))


def check(root: Path, threads: int) -> dict[str, float]:
    """Run the command on a folder and measure its process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "m2f_trainer", "check", str(root)], env=environment, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 1), "the check failed"
    seconds = time.perf_counter() - start
    return {"wall s": seconds, "cpu s": used.ru_utime + used.ru_stime, "peak MB": used.ru_maxrss / 1e3}


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument(
        "--folder", type=Path, required=True, help="folder of the datasets; those already there are reused"
    )
    made.add_argument("--photos", type=int, nargs="*", default=[1250, 5000])
    made.add_argument("--copies", type=int, nargs="*", default=[2000, 8000])
    arguments = made.parse_args()
    rows: list[dict[str, Any]] = []
    for what, sizes, write in (("photos", arguments.photos, write_photos), ("copies", arguments.copies, write_copies)):
        before: dict[str, Any] | None = None
        for images in sizes:
            root = arguments.folder / f"{what}-{images}"
            if not (root / "valid" / "_annotations.coco.json").is_file():
                write(root, images)
            figures = check(root, arguments.threads)
            growth = before and math.log(figures["cpu s"] / before["cpu s"]) / math.log(images / before["images"])
            before = {"what": what, "images": images, **figures, "growth": growth}
            rows.append(before)
    report("m2f check", rows, arguments)


if __name__ == "__main__":
    main()
