"""Fine-tunes Mask2Former on DINOv3 backbones for instance segmentation.

The public names load on first use, so importing the package takes no time. transformers' Auto classes know our models
as soon as both packages are imported, in either order (`auto_classes.py`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from m2f_trainer.auto_classes import register_with_transformers

if TYPE_CHECKING:
    from m2f_trainer.data.coco import load_coco
    from m2f_trainer.evaluation.coco_map import CocoMap
    from m2f_trainer.inference.predictor import Predictor
    from m2f_trainer.model.building import build_model
    from m2f_trainer.model.mask2former import load_model
    from m2f_trainer.training.trainer import M2FTrainer

__version__ = "0.1.0"
__all__ = ["CocoMap", "M2FTrainer", "Predictor", "__version__", "build_model", "load_coco", "load_model"]

HOMES = {
    "load_coco": "m2f_trainer.data.coco",
    "build_model": "m2f_trainer.model.building",
    "load_model": "m2f_trainer.model.mask2former",
    "M2FTrainer": "m2f_trainer.training.trainer",
    "CocoMap": "m2f_trainer.evaluation.coco_map",
    "Predictor": "m2f_trainer.inference.predictor",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(sorted(HOMES))}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})


register_with_transformers()
