"""The model, self-contained: importing it registers it with transformers' Auto classes."""

from m2f_trainer.model.building import build_model
from m2f_trainer.model.mask2former import M2FConfig, M2FModel, load_model

__all__ = ["M2FConfig", "M2FModel", "build_model", "load_model"]
