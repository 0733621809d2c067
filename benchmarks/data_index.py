"""An annotation file the size of COCO train2017, made up: how long it takes to index and to open again, and how much
memory that and each loading worker need.

    python -m benchmarks.data_index --folder /tmp/train2017 [--images 118287] [--instances 860001]

Polygons have 8 to 40 points, as COCO's. No image is read: indexing doesn't need them.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import in_a_process

CLASSES = 80
FILE = "train/_annotations.coco.json"  # told, so that no validation images are held out of it


def write_annotations(path: Path, images: int, instances: int) -> None:
    """Entry by entry, so that this needs no memory of its own."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": key, "name": f"class {key}"} for key in range(1, CLASSES + 1)]
    with path.open("w") as file:
        file.write(f'{{"info": {{}}, "licenses": [], "categories": {json.dumps(categories)}, "images": [')
        for k in range(images):
            name = f"{k:012d}.jpg"
            address = f"http://images.cocodataset.org/train2017/{name}"
            entry = {"license": 3, "file_name": name, "coco_url": address, "height": 480, "width": 640, "id": k}
            file.write(", " * (k > 0) + json.dumps({**entry, "date_captured": "2013-11-14 11:18:45"}))
        file.write('], "annotations": [')
        for k in range(instances):
            entry = annotation(rng)
            file.write(", " * (k > 0) + json.dumps({**entry, "image_id": int(rng.integers(images)), "id": k + 1}))
        file.write("]}")


def annotation(rng: np.random.Generator) -> dict[str, Any]:
    points = int(rng.integers(8, 41))
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = rng.uniform(0.6, 1, points) * rng.uniform(8, 110)
    outline = rng.uniform((60, 60), (580, 420)) + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline = outline.clip(0, (640, 480)).round(2)
    low, high = outline.min(axis=0), outline.max(axis=0)
    box = [*low.tolist(), *(high - low).round(2).tolist()]
    made = {"segmentation": [outline.reshape(-1).tolist()], "area": round(0.7 * box[2] * box[3], 2), "iscrowd": 0}
    return {**made, "bbox": box, "category_id": int(rng.integers(1, CLASSES + 1))}


def index(root: str, cache: str) -> dict[str, float]:
    """Wall and CPU seconds of `load_coco`, and the peak resident memory in GB of the process, imports included.

    CPU seconds are those of this process and of processes that it started; there are none today, and a peak of theirs
    would be told apart.
    """
    from m2f_trainer.data.dataset import load_coco

    before, start = cpu_seconds(), time.perf_counter()
    rows = load_coco(root, cache_dir=cache, annotations={"train": FILE})["train"]
    told = {"images": len(rows), "wall_seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - before}
    peaks = {"peak_gb": resource.RUSAGE_SELF, "peak_gb_of_a_child": resource.RUSAGE_CHILDREN}
    return {**told, **{name: resource.getrusage(who).ru_maxrss / 1e6 for name, who in peaks.items()}}


def cpu_seconds() -> float:
    """User and system time of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def worker_memory(root: str, cache: str) -> dict[str, float]:
    """Memory in MB that a forked worker writes to and so has to itself while it reads 5,000 random rows."""
    from m2f_trainer.data.dataset import load_coco

    rows = load_coco(root, cache_dir=cache, annotations={"train": FILE})["train"]
    reading, writing = multiprocessing.get_context("fork").Pipe(duplex=False)

    def read() -> None:
        before = private_mb()
        for k in np.random.default_rng(0).integers(len(rows), size=5000).tolist():
            rows[k]
        writing.send(private_mb() - before)

    worker = multiprocessing.get_context("fork").Process(target=read)
    worker.start()
    added = reading.recv()
    worker.join()
    return {"worker_mb": added}


def private_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--instances", type=int, default=860_001)
    options = parser.parse_args()
    file, cache = options.folder / FILE, options.folder / "cache"
    if not file.is_file():
        write_annotations(file, options.images, options.instances)
    shutil.rmtree(cache, ignore_errors=True)
    print(f"annotation file: {file.stat().st_size / 1e6:.0f} MB")
    for name, task in (("indexed", index), ("opened again", index), ("worker", worker_memory)):
        told = in_a_process(task, str(options.folder), str(cache))
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in told.items()))


if __name__ == "__main__":
    main()
