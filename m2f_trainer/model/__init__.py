"""The model, self-contained: importing it registers it with transformers' Auto classes."""

from .build import build_model
from .mask2former import M2FConfig, M2FModel, load_model

__all__ = ["M2FConfig", "M2FModel", "build_model", "load_model"]
