"""All steps on a small synthetic dataset: `m2f demo`."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.inference.predict import predict_folder
from m2f_trainer.model.backbones import find_row
from m2f_trainer.run_folder import RECIPE
from m2f_trainer.training.run import train

logger = logging.getLogger(__name__)


def demo(output_dir: Path, backbone: str | None = None, say: Callable[[str], None] = logger.warning) -> None:
    """Write a small synthetic dataset, train recipes/quickstart.json on it, evaluate, and draw predictions.

    `backbone`: name of a pretrained backbone, downloaded from the Hub, instead of the small random ViT.
    """
    torch.set_num_threads(1)  # tensors this small are slower on several threads, much slower on a busy machine
    data, run, pictures = output_dir / "data", output_dir / "run", output_dir / "pictures"
    write_sample(data)
    options = ["quickstart", "--dataset_name", str(data), "--output_dir", str(run)]
    if backbone is not None:
        row = find_row(backbone)
        side = str(8 * row.stride if row else 128)
        options += ["--backbone", backbone, "--backbone_config", "null", "--image_height", side, "--image_width", side]
    if (run / RECIPE).is_file():
        shutil.rmtree(run)  # of an earlier demo
    figures = train(load_recipe(options))
    predict_folder(str(run), [data / "test"], pictures)
    say(f"mask AP on the held-out images: {figures['eval_map']:.3f} (valid), {figures['test_map']:.3f} (test)")
    say(f"model: {run}\npictures of the test images: {pictures}\ndataset: {data}")
