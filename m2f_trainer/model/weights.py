"""Initial weights from elsewhere: a published Mask2Former head, or an m2f_trainer model with other classes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from .sources import ModelError, load_config, load_weights

logger = logging.getLogger(__name__)

HEAD_FIELDS = (
    "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "encoder_layers", "decoder_layers",
    "num_attention_heads", "dim_feedforward", "num_queries", "enforce_input_projection", "common_stride",
)  # fmt: skip
ENCODER = "model.pixel_level_module.encoder."
BACKBONE = f"{ENCODER}backbone."
HEAD_PARTS = ("model.pixel_level_module.decoder.", "model.transformer_module.")
QUERIES = ("queries_embedder.weight", "queries_features.weight")


@dataclass(frozen=True)
class LoadReport:
    """Names of tensors that were loaded, newly initialised, and unused in the source; and a note on the queries."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    queries: str = ""

    def __str__(self) -> str:
        """One line for the log, with the first names of the tensors that did not fit."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        for word, names in (("new", self.new), ("unused", self.unused)):
            some = f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
            parts.append(f"{len(names)} {word}{some}")
        return "; ".join([*parts, self.queries] if self.queries else parts)


@lru_cache(maxsize=1)
def _source(checkpoint: str) -> Mask2FormerForUniversalSegmentation:
    try:
        config = load_config(checkpoint)
        if not isinstance(config, Mask2FormerConfig):
            raise ValueError(f"it holds a {config.model_type!r} model")
        model: Mask2FormerForUniversalSegmentation = load_weights(
            Mask2FormerForUniversalSegmentation, checkpoint, lambda name: name.startswith(HEAD_PARTS), config=config
        )
        return model
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"head_checkpoint {checkpoint!r} could not be loaded: {first}\n  expected a transformers Mask2Former model "
            "with safetensors weights, such as facebook/mask2former-swin-small-coco-instance, or a local copy of one"
        ) from error


def head_fields(checkpoint: str) -> dict[str, Any]:
    """Return the configuration fields of a published head, and the channels of its four input maps, fine to coarse."""
    source = _source(checkpoint)
    decoder = source.model.pixel_level_module.decoder
    finest = [sequence[0].in_channels for sequence in decoder.lateral_convolutions[::-1]]
    coarser = [projection[0].in_channels for projection in decoder.input_projections][::-1]
    fields = {name: source.config.to_dict()[name] for name in HEAD_FIELDS}
    return {**fields, "neck_channels": [*finest, *coarser][-4:]}


def load_head(model: nn.Module, checkpoint: str) -> LoadReport:
    """Copy every head tensor whose name and shape match; backbone and neck stay as they are.

    The class head is copied only when the number of classes is equal.
    """
    source = {name: tensor for name, tensor in _source(checkpoint).state_dict().items() if not name.startswith(ENCODER)}
    source = {name: tensor for name, tensor in source.items() if not name.startswith("criterion.")}
    report = _copy_matching(model, source, skip=ENCODER)
    _source.cache_clear()
    logger.warning("head from %s: %s", checkpoint, report)
    return report


def load_model_weights(model: Any, source: Any) -> LoadReport:
    """Copy every matching tensor of an m2f_trainer model; rows of the class head are matched by category name.

    Raises ModelError when the backbones differ, since ours would stay randomly initialised.
    """
    report = _copy_matching(model, source.state_dict())
    missing = [name for name in report.new if name.startswith(BACKBONE)]
    if missing:
        theirs = source.config.backbone_name or source.config.backbone_config.model_type
        raise ModelError(
            f"init_from {source.config.name_or_path!r}: its backbone ({theirs}) differs from this model's: "
            f"{len(missing)} tensors are missing, such as {missing[0]}. Give the backbone and the backbone_config "
            "of the recipe.json there, or leave init_from out"
        )
    _copy_classes(model, source)
    logger.warning("weights from %s: %s", source.config.name_or_path, report)
    return report


@torch.no_grad()
def _copy_matching(model: nn.Module, source: dict[str, Tensor], skip: str = "\0") -> LoadReport:
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(skip)}
    fitting = [name for name in own if name in source and source[name].shape == own[name].shape]
    for name in fitting:
        own[name].copy_(source[name])
    resized = [name for name in own if name.endswith(QUERIES) and name in source and name not in fitting]
    queries = _copy_queries(own, source, resized)
    loaded = {*fitting, *(resized if queries else ())}
    new, unused = (tuple(name for name in names if name not in loaded) for names in (own, source))
    return LoadReport(tuple(fitting), new, unused, queries)


def _copy_queries(own: dict[str, Tensor], source: dict[str, Tensor], names: Sequence[str]) -> str:
    """Copy as many queries as both models have when only their number differs, and describe it. Others stay new."""
    counts = ""
    for name in names:
        (ours, width), (theirs, other) = own[name].shape, source[name].shape
        if width == other:
            taken = min(ours, theirs)
            own[name][:taken].copy_(source[name][:taken])
            counts = f"{taken} of the source's {theirs} queries copied, {ours - taken} new"
    return counts


@torch.no_grad()
def _copy_classes(model: Any, source: Any) -> None:
    """Copy the class head's row of each category by name, and the row of "no object"."""
    rows = {category["name"]: row for row, category in enumerate(source.config.categories)}
    rows[None] = len(rows)
    for row, name in enumerate([*(category["name"] for category in model.config.categories), None]):
        if name in rows:
            model.class_predictor.weight[row].copy_(source.class_predictor.weight[rows[name]])
            model.class_predictor.bias[row].copy_(source.class_predictor.bias[rows[name]])
