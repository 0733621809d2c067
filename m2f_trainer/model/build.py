"""Makes a model to be trained: configuration from parts, pretrained backbone, head from elsewhere."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .backbones import BACKBONES, ModelError, load_pretrained, read_config, stride_of
from .mask2former import M2FConfig, M2FModel, backbone_of, load_model
from .weights import head_fields, load_head, load_model_weights


def build_model(
    backbone: str | Mapping[str, Any],
    categories: Sequence[Mapping[str, Any]],
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
    categories       the classes in order, each {"id", "name"}
    image_size       (height, width) of the padded frame
    taps             1-based depths of a ViT that feed the neck; default the end of each quarter of it, or those of
                     init_from
    head_checkpoint  any Mask2Former checkpoint to take the pixel decoder and transformer decoder from
    init_from        a model of ours to take all weights from, other classes included
    drop_path        share of a batch's images that skip the backbone's last layer in training; earlier layers less
    rope_rescale     DINOv3's positions are scaled in training by a random factor from 1 / this to this; default not
    config_fields    fields of `M2FConfig`, such as num_queries, neck, hidden_dim

    Raises ModelError when a part can't be had or doesn't fit.
    """
    _check_fields(config_fields)
    source = load_model(init_from) if init_from else None
    backbone_config = read_config(backbone, tuple(taps), drop_path, rope_rescale)
    if source is not None and not taps and backbone_of(source.config).stage_names == backbone_config.stage_names:
        backbone_config.out_features = backbone_of(source.config).out_features
    config = M2FConfig(
        backbone_config=backbone_config,
        backbone_name=_lasting(backbone) if isinstance(backbone, str) else "",
        head_checkpoint=_lasting(head_checkpoint) if head_checkpoint else None,
        init_from=_lasting(init_from) if init_from else None,
        image_height=image_size[0],
        image_width=image_size[1],
        **{**(head_fields(head_checkpoint) if head_checkpoint else {}), **config_fields},
        **_label_fields(categories),
    )
    _check_size(backbone_of(config), image_size)
    model = M2FModel(config)
    if source is not None:
        load_model_weights(model, source)
        return model
    if isinstance(backbone, str):
        load_backbone_weights(model)
    if head_checkpoint:
        load_head(model, head_checkpoint)
    return model


def _lasting(name: str) -> str:
    """A folder by its full path: found again from elsewhere, and never taken for a Hub id of that name."""
    return str(Path(name).resolve()) if name not in BACKBONES and Path(name).is_dir() else name


def load_backbone_weights(model: M2FModel) -> None:
    """Fill the backbone with the pretrained weights that the configuration names. Raises ModelError."""
    pretrained = load_pretrained(model.config.backbone_name, backbone_of(model.config))
    model.encoder.backbone.load_state_dict(pretrained.state_dict())


def _check_fields(given: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(M2FConfig)}
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ModelError(f"unknown field {name!r} of the head's configuration: the nearest is {nearest!r}")


def _label_fields(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The configuration's three views of the classes: ours, and transformers' two maps."""
    names = [str(category["name"]) for category in categories]
    return {
        "categories": [{"id": int(category["id"]), "name": str(category["name"])} for category in categories],
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _check_size(backbone: PreTrainedConfig, image_size: tuple[int, int]) -> None:
    stride = stride_of(backbone)
    for name, side in zip(("image_height", "image_width"), image_size, strict=True):
        if side < stride or side % stride:
            below = max(stride, side // stride * stride)
            raise ModelError(
                f"{name} {side}: this backbone needs a multiple of {stride}; nearest are {below} and {below + stride}"
            )
