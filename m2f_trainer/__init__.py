"""Fine-tunes Mask2Former on DINOv3, DINOv2 and other backbones for instance segmentation.

Public names are imported on first use, which keeps importing the package fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from m2f_trainer.version import __version__

if TYPE_CHECKING:
    from m2f_trainer.config.training_arguments import TrainArguments
    from m2f_trainer.data.collate import InstanceDataset
    from m2f_trainer.data.dataset import categories_of, load_coco
    from m2f_trainer.data.transforms import EvalTransform, TrainTransform
    from m2f_trainer.evaluation.coco import CocoMap
    from m2f_trainer.inference.predictor import Predictor
    from m2f_trainer.model.build import build_model
    from m2f_trainer.model.mask2former import load_model
    from m2f_trainer.training.trainer import M2FTrainer

__all__ = [
    "CocoMap",
    "EvalTransform",
    "InstanceDataset",
    "M2FTrainer",
    "Predictor",
    "TrainArguments",
    "TrainTransform",
    "__version__",
    "build_model",
    "categories_of",
    "load_coco",
    "load_model",
]

PUBLIC = {
    "load_coco": "m2f_trainer.data.dataset",
    "categories_of": "m2f_trainer.data.dataset",
    "InstanceDataset": "m2f_trainer.data.collate",
    "TrainTransform": "m2f_trainer.data.transforms",
    "EvalTransform": "m2f_trainer.data.transforms",
    "TrainArguments": "m2f_trainer.config.training_arguments",
    "build_model": "m2f_trainer.model.build",
    "load_model": "m2f_trainer.model.mask2former",
    "M2FTrainer": "m2f_trainer.training.trainer",
    "CocoMap": "m2f_trainer.evaluation.coco",
    "Predictor": "m2f_trainer.inference.predictor",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        public = ", ".join(sorted(PUBLIC))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {public}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
