"""Compare runs in pictures: python -m benchmarks.accuracy.compare_runs DATASET OUT NAME=RUN_FOLDER [NAME=RUN_FOLDER
...]

Writes OUT/curve.png, the validation mask AP over steps, and OUT/predictions.png, images spread evenly over the test
split. Its columns are the image, its annotations, and the predictions of each run's final model with a score of at
least 0.5.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from m2f_trainer import Predictor
from m2f_trainer.data.dataset import categories_of
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.data.images import open_image
from m2f_trainer.evaluation.gallery import ground_truth
from m2f_trainer.run_folder import load_run
from m2f_trainer.viz.charts import line_chart, save_png

IMAGES, SIDE, GAP = 4, 220, 4


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in a grid, each cropped to a square and resized to `SIDE` pixels."""
    step = SIDE + GAP
    whole = Image.new("RGB", (step * len(rows[0]) - GAP, step * len(rows) - GAP), "white")
    for i, row in enumerate(rows):
        for k, picture in enumerate(row):
            side = min(picture.size)
            whole.paste(picture.crop((0, 0, side, side)).resize((SIDE, SIDE)), (k * step, i * step))
    return whole


def main(dataset: str, out: Path, runs: dict[str, str]) -> None:
    """Write both pictures."""
    out.mkdir(parents=True, exist_ok=True)
    curves = {name: [(0.0, 0.0), *load_run(Path(run)).curves["eval_map"]] for name, run in runs.items()}
    save_png(line_chart(curves, "step", "mask AP"), out / "curve.png")
    test = load_dataset(dataset)["test"]
    names = {category.id: category.name for category in categories_of(test)}
    rows = [test[k] for k in range(0, len(test), len(test) // IMAGES)][:IMAGES]
    images = [open_image(row["image"], f"image {row['image_id']}") for row in rows]
    columns = [
        images,
        [ground_truth(row).overlay(image, names, legend=False) for image, row in zip(images, rows, strict=True)],
    ]
    for run in runs.values():
        found = Predictor.from_pretrained(run)(images, threshold=0.5)
        columns.append([one.overlay(image, names, legend=False) for image, one in zip(images, found, strict=True)])
    grid(columns).save(out / "predictions.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), dict(one.split("=", 1) for one in sys.argv[3:]))
