"""Initial weights from elsewhere: a head of another model, or an m2f_trainer model with other classes."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    PreTrainedConfig,
)
from transformers.utils.hub import cached_file

from .mask2former import M2FConfig, M2FModel
from .sources import ModelError, load_config, load_weights, read_json_file

logger = logging.getLogger(__name__)

HEAD_FILE = "head.safetensors"
"""The weights of a saved head: those of a model without its backbone."""
HEAD_FIELDS = (
    "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "encoder_layers", "decoder_layers",
    "num_attention_heads", "dim_feedforward", "num_queries", "enforce_input_projection", "common_stride",
)  # fmt: skip
ENCODER = "model.pixel_level_module.encoder."
BACKBONE = f"{ENCODER}backbone."
PIXEL_DECODER, DECODER = "model.pixel_level_module.decoder.", "model.transformer_module.decoder."
HEAD_PARTS = (PIXEL_DECODER, "model.transformer_module.")
QUERIES = ("queries_embedder.weight", "queries_features.weight")
CLASS_HEAD = ("class_predictor.weight", "class_predictor.bias")
UNUSED = re.compile(r".*\.lora_[AB]\..*|criterion\..*")
ONEFORMER_FIELDS = {"feature_size": "conv_dim", "mask_feature_size": "mask_dim"} | {
    "enforce_input_projection": "enforce_input_proj"
}
"""Fields of Mask2Former's configuration -> OneFormer's, where they have other names."""
ONEFORMER = "oneformer."
ONEFORMER_NAMES = {
    r"(model\.pixel_level_module\.decoder\..*|model\.transformer_module\.level_embed\.weight)": r"\1",
    rf"{DECODER}decoder_norm\.(.*)": rf"{DECODER}layernorm.\1",
    rf"{DECODER}mask_embed\.layers\.(.*)": rf"{DECODER}mask_predictor.mask_embedder.\1",
    rf"({DECODER}layers\.\d+\.cross_attn\.)multihead_attn\.(.*)": r"\1\2",
    rf"({DECODER}layers\.\d+\.self_attn\.)self_attn\.(.*)": r"\1\2",
    rf"({DECODER}layers\.\d+\.(?:cross|self)_attn)\.norm\.(.*)": r"\1_layer_norm.\2",
    rf"({DECODER}layers\.\d+\.)ffn\.linear([12])\.(.*)": r"\1fc\2.\3",
    rf"({DECODER}layers\.\d+\.)ffn\.norm\.(.*)": r"\1final_layer_norm.\2",
}
"""Pattern of a tensor's name in OneFormer -> its name in Mask2Former. The others have no counterpart: those of texts,
the task, the queries, which OneFormer makes from both, and its class head.
"""


@dataclass(frozen=True)
class LoadReport:
    """Names of tensors that were loaded, newly initialised, and unused in the source; notes on queries and classes."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    queries: str = ""
    classes: str = ""

    def __str__(self) -> str:
        """One line for the log, with the first names of the tensors that did not fit."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        for word, names in (("new", self.new), ("unused", self.unused)):
            some = f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
            parts.append(f"{len(names)} {word}{some}")
        return "; ".join([*parts, *(note for note in (self.queries, self.classes) if note)])


@dataclass(frozen=True)
class Head:
    """A head to start from: its configuration as fields of `M2FConfig`, and its tensors under the names of `M2FModel`.

    `source` is its folder or Hub id, `classes` are the names of the class head's rows. The fields include the channels
    of its four input maps, fine to coarse, as `neck_channels`.
    """

    source: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...]


def read_head(checkpoint: str) -> Head:
    """The head of a Mask2Former or OneFormer of transformers, of a model of ours, or a saved head (`HEAD_FILE`).

    Raises ModelError when there is none.
    """
    try:
        config = load_config(checkpoint)
        if isinstance(config, M2FConfig):
            return _own_head(checkpoint, config)
        if isinstance(config, Mask2FormerConfig):
            return _mask2former_head(checkpoint, config)
        if isinstance(config, OneFormerConfig):
            return _oneformer_head(checkpoint, config)
        raise ValueError(f"it holds a {config.model_type!r} model")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"head_checkpoint {checkpoint!r} could not be loaded: {first}\n  expected a Mask2Former or OneFormer of "
            "transformers with safetensors weights, such as facebook/mask2former-swin-small-coco-instance, or a local "
            "copy of one; or a model of m2f_trainer, or a head that save_head wrote"
        ) from error


def _mask2former_head(checkpoint: str, config: PreTrainedConfig) -> Head:
    model = load_weights(
        Mask2FormerForUniversalSegmentation, checkpoint, lambda name: name.startswith(HEAD_PARTS), config=config
    )
    given = config.to_dict()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(ENCODER)}
    return _head(checkpoint, {name: given[name] for name in HEAD_FIELDS}, tensors, (config.id2label or {}).values())


def _oneformer_head(checkpoint: str, config: PreTrainedConfig) -> Head:
    """The pixel decoder and the transformer decoder's layers; queries and class head are new."""

    def is_needed(name: str) -> bool:
        return not _oneformer_name(name).startswith(ONEFORMER)

    model = load_weights(OneFormerForUniversalSegmentation, checkpoint, is_needed, config=config)
    given = config.to_dict()
    fields = {name: given[ONEFORMER_FIELDS.get(name, name)] for name in HEAD_FIELDS if name != "num_queries"}
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(ENCODER)}
    return _head(checkpoint, fields, {_oneformer_name(name): tensor for name, tensor in state.items()}, ())


def _oneformer_name(name: str) -> str:
    """Mask2Former's name of a tensor of OneFormer; one without a counterpart is marked as OneFormer's."""
    for pattern, new in ONEFORMER_NAMES.items():
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(new)
    return f"{ONEFORMER}{name}"


def _own_head(checkpoint: str, config: M2FConfig) -> Head:
    classes = [category["name"] for category in config.categories or []]
    return _head(checkpoint, own_head_fields(config), head_tensors(checkpoint), classes)


def own_head_fields(config: M2FConfig) -> dict[str, Any]:
    """The fields of a model of ours that give the shape of its neck and head, and the points of their loss."""
    names = (*HEAD_FIELDS, "neck", "neck_channels", "train_num_points")
    return {name: getattr(config, name) for name in names}


def _head(source: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], classes: Any) -> Head:
    """With the channels of the four maps that the pixel decoder reads, fine to coarse, as `neck_channels`."""
    inputs = {name: one.shape[1] for name, one in tensors.items() if name.startswith(PIXEL_DECODER) and one.ndim > 1}
    finest = [inputs[name] for name in sorted(inputs) if re.search(r"\.adapter_\d+\.0\.weight$", name)]
    coarser = [inputs[name] for name in sorted(inputs) if re.search(r"\.input_projections\.\d+\.0\.weight$", name)]
    used = {name: tensor for name, tensor in tensors.items() if not UNUSED.fullmatch(name)}
    return Head(source, {**fields, "neck_channels": [*finest, *coarser[::-1]][-4:]}, used, tuple(classes))


def head_tensors(checkpoint: str) -> dict[str, Tensor]:
    """The tensors of one of our models or saved heads, without the backbone's."""
    index = read_json_file(checkpoint, "model.safetensors.index.json")
    if cached_file(checkpoint, HEAD_FILE, _raise_exceptions_for_missing_entries=False):
        files = {HEAD_FILE}
    else:
        files = {Path(name).name for name in index["weight_map"].values()} if index else {"model.safetensors"}
    tensors = {
        name: one for file in sorted(files) for name, one in load_file(str(cached_file(checkpoint, file))).items()
    }
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(BACKBONE)}


def load_head(model: M2FModel, head: Head) -> LoadReport:
    """Copy every tensor of a head whose name and shape match, rows of the class head by the classes' names.

    The backbone stays as it is; so does the neck, except from a head of ours.
    """
    has_neck = any(name.startswith(ENCODER) for name in head.tensors)
    report = _copy_matching(model, head.tensors, head.classes, skip=BACKBONE if has_neck else ENCODER)
    logger.warning("head from %s: %s", head.source, report)
    return report


def load_model_weights(model: M2FModel, source: M2FModel) -> LoadReport:
    """Copy every matching tensor of an m2f_trainer model; rows of the class head are matched by category name.

    Raises ModelError when the backbones differ, since ours would stay randomly initialised.
    """
    classes = [category["name"] for category in source.config.categories or []]
    tensors = {name: tensor for name, tensor in source.state_dict().items() if not UNUSED.fullmatch(name)}
    report = _copy_matching(model, tensors, classes)
    missing = [name for name in report.new if name.startswith(BACKBONE)]
    if missing:
        config: Any = source.config
        theirs = config.backbone_name or config.backbone_config.model_type
        raise ModelError(
            f"init_from {config.name_or_path!r}: its backbone ({theirs}) differs from this model's: "
            f"{len(missing)} tensors are missing, such as {missing[0]}. Give the backbone and the backbone_config "
            "of the recipe.json there, or leave init_from out"
        )
    logger.warning("weights from %s: %s", source.config.name_or_path, report)
    return report


@torch.no_grad()
def _copy_matching(
    model: M2FModel, source: Mapping[str, Tensor], classes: Sequence[str], skip: str = "\0"
) -> LoadReport:
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(skip)}
    own = {name: tensor for name, tensor in own.items() if name not in CLASS_HEAD and not UNUSED.fullmatch(name)}
    fitting = [name for name in own if name in source and source[name].shape == own[name].shape]
    for name in fitting:
        own[name].copy_(source[name])
    resized = [name for name in own if name.endswith(QUERIES) and name in source and name not in fitting]
    queries = _copy_queries(own, source, resized)
    loaded = {*fitting, *(resized if queries else ())}
    new, unused = (tuple(name for name in names if name not in {*loaded, *CLASS_HEAD}) for names in (own, source))
    return LoadReport(tuple(fitting), new, unused, queries, _copy_classes(model, source, classes))


def _copy_queries(own: dict[str, Tensor], source: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """Copy as many queries as both models have when only their number differs, and describe it. Others stay new."""
    counts = ""
    for name in names:
        (ours, width), (theirs, other) = own[name].shape, source[name].shape
        if width == other:
            taken = min(ours, theirs)
            own[name][:taken].copy_(source[name][:taken])
            counts = f"{taken} of the source's {theirs} queries copied, {ours - taken} new"
    return counts


def _copy_classes(model: M2FModel, source: Mapping[str, Tensor], classes: Sequence[str]) -> str:
    """Copy the class head's row of each category by name, and the row of "no object"; describe what became of each."""
    own = [category["name"] for category in model.config.categories or []]
    weight, bias = (source.get(name) for name in CLASS_HEAD)
    found: list[int | None] = [None] * len(own)
    if weight is not None and bias is not None and weight.shape[1] == model.class_predictor.in_features:
        found = _rows_of_names(own, classes)
        for row, theirs in enumerate([*found, len(weight) - 1]):
            if theirs is not None:
                model.class_predictor.weight[row].copy_(weight[theirs])
                model.class_predictor.bias[row].copy_(bias[theirs])
    fates = {
        "kept": [name for name, theirs in zip(own, found, strict=True) if theirs is not None],
        "new": [name for name, theirs in zip(own, found, strict=True) if theirs is None],
        "dropped": [name for row, name in enumerate(classes) if row not in found],
    }
    return "classes " + "; ".join(f"{fate}: {_named(names)}" for fate, names in fates.items() if names)


def _rows_of_names(own: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """Place in `classes` of each of our names: the same one, or the only one without regard to case and spaces."""
    plain, plain_own = ([" ".join(name.split()).casefold() for name in names] for names in (classes, own))
    return [
        classes.index(name) if name in classes else plain.index(alike) if plain.count(alike) == 1 else None
        for name, alike in zip(own, plain_own, strict=True)
    ]


def _named(names: Sequence[str], limit: int = 20) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
