"""Index a synthetic annotation file of the size of COCO train2017: time to index and to reopen it, and the memory that
indexing and each data worker need.

    python -m benchmarks.data_index --folder /tmp/train2017 [--images 118287] [--instances 860001]

Polygons have 8 to 40 points, as in COCO. No image is read, because indexing needs none.
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

from benchmarks.measure import in_fresh_process

CLASSES = 80
FILE = "train/_annotations.coco.json"  # passed explicitly, so that no images are held out for validation


def write_annotations(path: Path, images: int, instances: int) -> None:
    """Write the file entry by entry, in constant memory."""
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
    """A COCO annotation with a random polygon, without `id` and `image_id`."""
    points = int(rng.integers(8, 41))
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = rng.uniform(0.6, 1, points) * rng.uniform(8, 110)
    outline = rng.uniform((60, 60), (580, 420)) + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline = outline.clip(0, (640, 480)).round(2)
    low, high = outline.min(axis=0), outline.max(axis=0)
    box = [*low.tolist(), *(high - low).round(2).tolist()]
    shape = {"segmentation": [outline.reshape(-1).tolist()], "area": round(0.7 * box[2] * box[3], 2), "iscrowd": 0}
    return {**shape, "bbox": box, "category_id": int(rng.integers(1, CLASSES + 1))}


def index(root: str, cache: str) -> dict[str, float]:
    """Wall and CPU seconds of `load_coco`, and the peak resident memory in GB of the process, imports included.

    CPU seconds include child processes; their peak memory is reported separately. `load_coco` starts none at present.
    """
    from m2f_trainer.data.dataset import load_coco

    before, start = cpu_seconds(), time.perf_counter()
    rows = load_coco(root, cache_dir=cache, annotations={"train": FILE})["train"]
    seconds = {"wall_seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - before}
    peaks = {"peak_gb": resource.RUSAGE_SELF, "peak_gb_of_a_child": resource.RUSAGE_CHILDREN}
    memory = {name: resource.getrusage(who).ru_maxrss / 1e6 for name, who in peaks.items()}
    return {"images": len(rows), **seconds, **memory}


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def worker_memory(root: str, cache: str) -> dict[str, float]:
    """Private memory in MB that a forked worker gains while it reads 5,000 random rows."""
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
    """Memory of this process that it has written to and shares with no other."""
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
    for name, task in (("indexed", index), ("reopened", index), ("worker", worker_memory)):
        figures = in_fresh_process(task, str(options.folder), str(cache))
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
