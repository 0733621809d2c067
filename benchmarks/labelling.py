"""Do the images that a model is least certain about teach more than random ones, if they are labelled next?

    python -m benchmarks.labelling DATASET BACKBONE OUT [--seeds 0 1 2] [--measure NAME ...] [--FIELD value ...]

For each seed: a model is trained on `--first` random training images; `--added` images of a random pool are added,
either those of the highest uncertainty or random ones, and a new model is trained on each set with the same recipe and
steps. The pool's labels are used only then. AP is of the validation images. Further options are recipe fields of all
trainings; fields that `m2f train` would choose by the labelled images should be among them.

DATASET is a folder with train/ and valid/, each with _annotations.coco.json. Results in OUT are reused, so that an
interrupted command can be repeated; other options need another OUT.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import in_fresh_process, machine

ANNOTATIONS = "_annotations.coco.json"
LOWEST = 0.05
"""Predictions of lower scores are ignored."""

PYTHON = [sys.executable]


def score_doubt(scores: Sequence[float], threshold: float) -> float:
    """The sum of min(p, 1 - p) over scores p; `threshold` is not used. It grows with the number of objects."""
    return sum(min(p, 1 - p) for p in scores)


def errors_per_object(scores: Sequence[float], threshold: float) -> float:
    """Expected wrong decisions per found object, as if the probability of an object were 0.5 at the threshold.

    Scores are no probabilities: those of a short training hardly reach 0.5. Below and above the threshold, where F1 is
    highest, they are stretched to 0 to 0.5 and 0.5 to 1. A decision of probability p is wrong with min(p, 1 - p). One
    object is added, so that an image without any counts as certain.
    """
    errors = sum(0.5 * (p / threshold if p < threshold else (1 - p) / (1 - threshold)) for p in scores)
    return errors / (1 + sum(p > threshold for p in scores))


MEASURES = {"errors_per_object": errors_per_object, "score_doubt": score_doubt}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    rows = [once(arguments, seed, arm) for seed in arguments.seeds for arm in ("random", *arguments.measure)]
    print(f"{', '.join(f'{name} {value}' for name, value in machine().items())}\n")
    columns = ["seed", "added", "images", "objects", "AP", "AP50", "AP75", "kinds added", "CPU minutes"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(row[column]) for column in columns)} |")
    for measure in arguments.measure:
        gains = [_ap(rows, seed, measure) - _ap(rows, seed, "random") for seed in arguments.seeds]
        print(f"{measure}: mean gain in AP {statistics.mean(gains):+.1f} ({', '.join(f'{g:+.1f}' for g in gains)})")


def _ap(rows: Sequence[dict[str, Any]], seed: int, arm: str) -> float:
    return next(float(row["AP"]) for row in rows if (row["seed"], row["added"]) == (seed, arm))


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.allow_abbrev = False  # --seed is a recipe field, not --seeds
    made.add_argument("dataset", type=Path)
    made.add_argument("backbone", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--measure", nargs="+", choices=list(MEASURES), default=["errors_per_object"])
    made.add_argument("--first", type=int, default=50, help="labelled images of the first model [50]")
    made.add_argument("--added", type=int, default=50, help="images that are labelled next [50]")
    made.add_argument("--pool", type=int, default=200, help="images without labels to choose from [200]")
    made.add_argument("--steps", type=int, default=250, help="steps of each training [250]")
    arguments, fields = made.parse_known_args()
    arguments.fields = fields
    return arguments


def once(arguments: argparse.Namespace, seed: int, arm: str) -> dict[str, Any]:
    """The row of one arm, "random" or a measure; trained if its result is absent."""
    content = json.loads((arguments.dataset / "train" / ANNOTATIONS).read_text())
    ids = np.random.default_rng(seed).permutation(sorted(image["id"] for image in content["images"])).tolist()
    first, pool = ids[: arguments.first], ids[arguments.first : arguments.first + arguments.pool]
    folder = arguments.out / str(seed)
    if arm == "random":
        added = pool[: arguments.added]  # the pool is in random order
    else:
        found = pool_scores(arguments, content, seed, first, pool)
        scores, threshold = found["scores"], found["threshold"]
        added = sorted(pool, key=lambda image_id: -MEASURES[arm](scores[str(image_id)], threshold))[: arguments.added]
    result = folder / f"{arm}.json"
    if not result.exists():
        minutes = train(arguments, folder / arm, seed, [*first, *added])
        figures = json.loads((folder / arm / "run" / "metrics.json").read_text())
        result.write_text(json.dumps({**figures, "cpu_minutes": minutes}, indent=1) + "\n")
    figures = json.loads(result.read_text())
    objects = Counter(one["image_id"] for one in content["annotations"])
    kinds = Counter(image.get("modality", "-") for image in content["images"] if image["id"] in set(added))
    return {
        "seed": seed,
        "added": arm,
        "images": len(added),
        "objects": sum(objects[image_id] for image_id in added),
        "AP": f"{100 * figures['eval_map']:.1f}",
        "AP50": f"{100 * figures['eval_map_50']:.1f}",
        "AP75": f"{100 * figures['eval_map_75']:.1f}",
        "kinds added": ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        "CPU minutes": f"{figures['cpu_minutes']:.1f}",
    }


def pool_scores(
    arguments: argparse.Namespace, content: dict[str, Any], seed: int, first: Sequence[int], pool: Sequence[int]
) -> dict[str, Any]:
    """The first model's threshold, and the scores of its predictions in each image by id."""
    folder = arguments.out / str(seed)
    result = folder / "pool.json"
    if not result.exists():
        minutes = train(arguments, folder / "first", seed, first, validation=5)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        paths = [arguments.dataset / "train" / names[image_id] for image_id in pool]
        before = cpu_minutes()
        threshold, scores = in_fresh_process(predict, folder / "first" / "run", paths)
        written = {
            "cpu_minutes": {"train": minutes, "predict": cpu_minutes() - before},
            "threshold": threshold,
            "scores": dict(zip(pool, scores, strict=True)),
        }
        result.write_text(json.dumps(written, indent=1) + "\n")
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded


def predict(model: Path, paths: Sequence[Path]) -> tuple[float, list[list[float]]]:
    """The lowest threshold of the classes, and the scores above `LOWEST` in each image."""
    from m2f_trainer.inference.predictor import Predictor

    torch.set_num_threads(1)
    predictor = Predictor.from_pretrained(str(model), precision="bf16")
    found = predictor.stream(paths, batch_size=8, threshold=LOWEST)
    return min(predictor.thresholds().values()), [instances.scores.tolist() for instances in found]


def train(
    arguments: argparse.Namespace, folder: Path, seed: int, ids: Sequence[int], validation: int | None = None
) -> float:
    """Train on images of the training split, validated on the first `validation` or all; return CPU minutes."""
    shutil.rmtree(folder, ignore_errors=True)
    for split, chosen in (("train", set(ids)), ("valid", None)):
        content = json.loads((arguments.dataset / split / ANNOTATIONS).read_text())
        images = [image for image in content["images"] if chosen is None or image["id"] in chosen]
        images = images if split == "train" else images[:validation]
        kept = {image["id"] for image in images}
        content = {
            **content,
            "images": images,
            "annotations": [one for one in content["annotations"] if one["image_id"] in kept],
        }
        (folder / "data" / split).mkdir(parents=True)
        (folder / "data" / split / ANNOTATIONS).write_text(json.dumps(content))
        for image in images:
            shutil.copyfile(
                arguments.dataset / split / image["file_name"], folder / "data" / split / image["file_name"]
            )
    options = [
        "--dataset_name", folder / "data", "--backbone", arguments.backbone, "--output_dir", folder / "run",
        "--max_steps", arguments.steps, "--checkpointing_steps", arguments.steps, "--seed", seed,
        "--dataloader_num_workers", "0", "--report_to", "none", "--disable_tqdm", "true", *arguments.fields,
    ]  # fmt: skip
    before = cpu_minutes()
    with (folder / "log").open("w") as log:
        command = [*PYTHON, "-m", "m2f_trainer", "train", *map(str, options)]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return cpu_minutes() - before


def cpu_minutes() -> float:
    """CPU minutes of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


if __name__ == "__main__":
    main()
