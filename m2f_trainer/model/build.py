"""Builds a model to train: its configuration, pretrained backbone and initial head weights."""

import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .backbones import (
    BACKBONES,
    ModelError,
    feature_maps,
    find_row,
    is_pyramidal,
    licence_of,
    load_pretrained,
    normalization_of,
    read_config,
    set_noise,
    stride_of,
    taps_of,
)
from .mask2former import M2FConfig, M2FModel, backbone_of, load_model
from .neck import SCRIPT_NECKS, smallest_side
from .sources import check_limits, load_config, load_weights, strict_message, with_floats
from .weights import Head, load_head, load_model_weights, own_head_fields, read_head


def build_model(
    backbone: str | Mapping[str, Any],
    categories: Sequence[Any],
    *,
    image_size: tuple[int, int] = (1024, 1024),
    taps: Sequence[int] = (),
    head_checkpoint: str | None = None,
    init_from: str | None = None,
    drop_path: float = 0.0,
    rope_rescale: float | None = None,
    **config_fields: Any,
) -> M2FModel:
    """Assemble a model to be trained.

    backbone         a table name, Hub id or folder (pretrained weights), or a configuration dictionary (random weights)
    categories       the classes in order: of `categories_of`, or dictionaries {"id", "name"}; ids are distinct
    image_size       (height, width) of the padded frame
    taps             1-based depths of a ViT that feed the neck; default the end of each quarter of it, or those of
                     init_from
    head_checkpoint  any Mask2Former checkpoint to initialise pixel decoder and transformer decoder from
    init_from        an m2f_trainer model to initialise all weights from; its classes may differ. A converted checkpoint
                     of the original script keeps its own neck
    drop_path        stochastic depth rate of the backbone's last layer; it grows linearly from 0 at the first
    rope_rescale     scale DINOv3's RoPE coordinates in training by a random factor in [1 / this, this]; default off
    config_fields    fields of `M2FConfig`, such as num_queries, neck, hidden_dim. Without them, a model that starts
                     from another one has the same widths, layers and loss points

    Raises ModelError when a part can't be loaded or doesn't fit.
    """
    config_fields = _checked_fields(config_fields)
    source = load_model(init_from) if init_from else None
    if source is not None and (_is_converted(source) or (not taps and _has_backbone(source, backbone))):
        backbone_config = deepcopy(backbone_of(source.config))  # without access to a gated backbone, too
        set_noise(backbone_config, drop_path, rope_rescale)
    else:
        backbone_config = read_config(backbone, tuple(taps), drop_path, rope_rescale)
        if source is not None and not taps and _same_backbone(backbone_of(source.config), backbone_config):
            backbone_config = read_config(backbone, taps_of(backbone_of(source.config)), drop_path, rope_rescale)
    if source is not None and _is_converted(source):
        kept = ("neck", "neck_channels", "last_norm", "backbone_name", "backbone_licence")
        config_fields |= {name: getattr(source.config, name) for name in kept}
        head_checkpoint = source.config.head_checkpoint  # for the licence chain; its weights are not read
    head = read_head(head_checkpoint) if head_checkpoint and source is None else None
    try:
        config = M2FConfig(
            backbone_config=backbone_config,
            head_checkpoint=_absolute_source(head_checkpoint) if head_checkpoint else None,
            init_from=_absolute_source(init_from) if init_from else None,
            image_height=image_size[0],
            image_width=image_size[1],
            **{
                **_head_fields(head, source),
                **_source_fields(backbone, source),
                **config_fields,
            },
            **_label_fields(categories),
        )
    except StrictDataclassError as error:
        raise ModelError(f"the head's configuration: {strict_message(error)}") from error
    _check_size(config)
    model = M2FModel(config)
    if source is not None:
        load_model_weights(model, source)
        return model
    if isinstance(backbone, str):
        load_backbone_weights(model)
    if head is not None:
        load_head(model, head)
    return model


def resume_model(checkpoint: str, *, has_weights: bool = True, **config_fields: Any) -> M2FModel:
    """The model of a run's checkpoint, to go on training it. Nothing that the run began with is read.

    has_weights      whether to read the weights, too; otherwise they are random
    config_fields    fields of `M2FConfig` that replace those of the checkpoint

    Raises ModelError when a field doesn't fit the model.
    """
    config = load_config(checkpoint)
    if not isinstance(config, M2FConfig):
        raise ModelError(f"{checkpoint!r} holds a {config.model_type!r} model, not one of m2f_trainer's")
    for name, value in _checked_fields(config_fields).items():
        setattr(config, name, value)
    _check_size(config)
    model = M2FModel(config)
    if has_weights:  # `from_pretrained` alone would let unused parameters be trained
        model.load_state_dict(load_weights(M2FModel, checkpoint, config=config).state_dict())
    return model


def load_base_weights(model: M2FModel, init_from: str | None, backbone: str | None = None) -> None:
    """Fill the backbone with the weights that it began with: those of `init_from`, or pretrained ones.

    These are `backbone`'s, by default those that the configuration names; a backbone without a name keeps its weights,
    because it began with random ones. Raises ModelError.
    """
    if init_from:
        load_model_weights(model, load_model(init_from))
    elif backbone or model.config.backbone_name:
        load_backbone_weights(model, backbone)


def _is_converted(source: M2FModel) -> bool:
    """True for a checkpoint of the original script, which keeps its own backbone and neck."""
    return source.config.neck in SCRIPT_NECKS


def _has_backbone(source: M2FModel, backbone: str | Mapping[str, Any]) -> bool:
    """True if `source` was built on the published backbone that `backbone` names."""
    if not isinstance(backbone, str) or not source.config.backbone_name:
        return False
    row = find_row(backbone)
    is_row = row is not None and row == find_row(source.config.backbone_name)
    return is_row or _absolute_source(backbone) == source.config.backbone_name


def _same_backbone(source: PreTrainedConfig, config: PreTrainedConfig) -> bool:
    """True for two ViTs of one architecture; `source` may lack the layers that `config` has after its last tap."""
    if is_pyramidal(source) or is_pyramidal(config):
        return False
    alike = source.model_type == config.model_type
    alike = alike and feature_maps(source)[0].channels == feature_maps(config)[0].channels
    return bool(alike and source.num_hidden_layers <= config.num_hidden_layers)


def _head_fields(head: Head | None, start: M2FModel | None) -> dict[str, Any]:
    """The configuration's fields that give the shape of the head that the weights come from; none for a new head."""
    if start is not None:
        return own_head_fields(start.config)
    return dict(head.fields) if head else {}


def _source_fields(backbone: str | Mapping[str, Any], start: M2FModel | None) -> dict[str, Any]:
    """The configuration's fields that follow from the backbone's source: its name, licence and normalisation.

    A model that starts from another one keeps the normalisation of that one, and what is known of the same backbone.
    """
    given: dict[str, Any] = {"backbone_name": _absolute_source(backbone)} if isinstance(backbone, str) else {}
    if start is not None and _has_backbone(start, backbone):
        given["backbone_licence"] = start.config.backbone_licence
    elif isinstance(backbone, str):
        mean, std = normalization_of(backbone)
        given |= {"backbone_licence": licence_of(backbone), "image_mean": mean, "image_std": std}
    if start is not None:
        given |= {"image_mean": start.config.image_mean, "image_std": start.config.image_std}
    return given


def _absolute_source(name: str) -> str:
    """The absolute path of a folder or file: valid from any working directory, and never mistaken for a Hub id."""
    return str(Path(name).resolve()) if name not in BACKBONES and Path(name).exists() else name


def load_backbone_weights(model: M2FModel, source: str | None = None) -> None:
    """Fill the backbone with the pretrained weights of a source, by default the one that the configuration names.

    Raises ModelError.
    """
    pretrained = load_pretrained(source or model.config.backbone_name, backbone_of(model.config))
    model.encoder.backbone.load_state_dict(pretrained.state_dict())


def _checked_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields with floats where the configuration has floats. Raises ModelError for unknown ones."""
    types: dict[str, Any] = {field.name: field.type for field in fields(M2FConfig)}
    for name in given:
        if name not in types:
            nearest = difflib.get_close_matches(name, types, n=1, cutoff=0.0)[0]
            raise ModelError(f"unknown field {name!r} of the head's configuration: the nearest is {nearest!r}")
    check_limits(given, "the head's configuration")
    return {name: with_floats(value, types[name]) for name, value in given.items()}


def _label_fields(given: Sequence[Any]) -> dict[str, Any]:
    """The configuration's class fields: our `categories`, and transformers' `id2label` and `label2id`."""
    categories = [vars(one) if is_dataclass(one) else one for one in given]
    if not all(isinstance(one, Mapping) and "name" in one and type(one.get("id")) is int for one in categories):
        raise ModelError(f"categories: expected each as {{'id': 1, 'name': 'cat'}}, got {categories}")
    ids = [category["id"] for category in categories]
    if not ids or len(set(ids)) < len(ids):
        raise ModelError(f"categories: expected one or more with distinct ids, got the ids {ids}")
    names = [str(category["name"]) for category in categories]
    return {
        "categories": [{"id": key, "name": name} for key, name in zip(ids, names, strict=True)],
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _check_size(config: M2FConfig) -> None:
    backbone, sides = backbone_of(config), {"image_height": config.image_height, "image_width": config.image_width}
    stride, least = stride_of(backbone), smallest_side(config.neck, stride_of(backbone), not is_pyramidal(backbone))
    for name, side in sides.items():
        if side < least or side % stride:
            below = max(least, side // stride * stride)
            raise ModelError(
                f"{name} {side}: this backbone needs a multiple of {stride}, with this neck at least {least}; nearest "
                f"are {below} and {below + stride}"
            )
    feature_maps(backbone, (config.image_height, config.image_width))  # some backbones take images of one size only
