"""Mask2Former on a DINO backbone: configuration, assembly, building, saving and loading.

The pixel decoder, transformer decoder and class head keep transformers' names and shapes, so weights interchange with
any Mask2Former checkpoint. This file and the ones it imports are copied into every saved folder, so that the model
loads with `trust_remote_code=True` where m2f_trainer isn't installed.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    PreTrainedConfig,
)
from transformers import (
    initialization as init,
)
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerForUniversalSegmentationOutput,
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerPixelDecoderEncoderLayer,
    Mask2FormerPreTrainedModel,
)

from .backbones import ModelError, load_pretrained, read_config, stride_of
from .criterion import Criterion, LossSettings
from .heads import head_fields, load_head, load_model_weights
from .matching import CompactMasks
from .pixel_decoder import PixelDecoder
from .pyramid import ChannelNorm, Encoder, SimplePyramid
from .query_decoder import QueryDecoder

PIPELINE_CLASS = "AutoModelForImageSegmentation"  # transformers' image-segmentation pipeline asks for this one
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@strict
class M2FConfig(Mask2FormerConfig):
    """Mask2Former's configuration with the neck, the categories and the image geometry.

    categories      class k is the k-th entry, {"id": the dataset's own id, "name": ...}
    image_height, image_width
                    the padded frame that images are fitted into, multiples of the backbone's stride
    backbone_name   what the backbone was made from: a table name, Hub id or folder; "" for a random start
    head_checkpoint, init_from
                    what the weights started from, kept for the licence chain
    """

    model_type = "mask2former_dino"

    neck: str = "pyramid"
    neck_channels: list[int] | None = None
    categories: list[dict[str, Any]] | None = None
    image_height: int = 1024
    image_width: int = 1024
    image_mean: list[float] | tuple[float, ...] = IMAGE_MEAN
    image_std: list[float] | tuple[float, ...] = IMAGE_STD
    backbone_name: str = ""
    head_checkpoint: str | None = None
    init_from: str | None = None

    def validate_architecture(self) -> None:
        """Nothing to refuse: transformers' own check would warn about every backbone but Swin."""


class PixelLevelModule(nn.Module):
    """Encoder and pixel decoder, under transformers' names."""

    def __init__(self, config: M2FConfig) -> None:
        super().__init__()
        self.encoder = Encoder(_backbone(config), config.neck, config.neck_channels)
        self.decoder = PixelDecoder(config, self.encoder.channels)


class Body(nn.Module):
    """Everything but the class head, under transformers' names."""

    def __init__(self, config: M2FConfig) -> None:
        super().__init__()
        self.pixel_level_module = PixelLevelModule(config)
        self.transformer_module = QueryDecoder(in_features=config.feature_size, config=config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised (B, 3, H, W) -> hidden (L, B, Q, C), mask embeddings (L, B, Q, C), features (B, C, H/4, W/4)."""
        features, levels = self.pixel_level_module.decoder(self.pixel_level_module.encoder(pixel_values))
        hidden, embeddings = self.transformer_module(levels, features)
        return hidden, embeddings, features


class M2FModel(Mask2FormerPreTrainedModel):
    """Mask2Former for instance segmentation on a DINO backbone."""

    config_class = M2FConfig
    config: M2FConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Encoder", "PixelDecoder", "QueryDecoder"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"\.lora_[AB]\.", r"^criterion\."]  # noqa: RUF012

    def __init__(self, config: M2FConfig) -> None:
        super().__init__(config)
        if config.dropout or config.pre_norm:
            raise ModelError("dropout and pre_norm are not part of Mask2Former as released: leave them at 0 and false")
        self.model = Body(config)
        classes = len(config.categories or [])
        self.class_predictor = nn.Linear(config.hidden_dim, classes + 1)
        self.criterion = Criterion(classes, _loss_settings(config))
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        for name in ("mean", "std"):
            self.register_buffer(f"pixel_{name}", torch.zeros(1, 3, 1, 1), persistent=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        class_labels: Sequence[Tensor] | None = None,
        num_items_in_batch: Tensor | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> Mask2FormerForUniversalSegmentationOutput | tuple[Tensor, ...]:
        """Return class logits (B, Q, K + 1) and mask logits (B, Q, H/4, W/4), and the loss when there are labels.

        pixel_values  (B, 3, H, W): uint8 as read, or floats already normalised with image_mean and image_std
        pixel_mask    (B, H, W): 1 where there is image, 0 where there is padding
        mask_labels   one dense (N_b, H, W) an image, or the fields of `CompactMasks` for the whole batch
        class_labels  one int64 (N_b,) an image
        num_items_in_batch
                      the loss's two divisors over the whole global batch (see `criterion.normalizer`)
        """
        hidden, embeddings, features = self.model(self.normalise(pixel_values, pixel_mask))
        if mask_labels is None or class_labels is None:
            hidden, embeddings = hidden[-1:], embeddings[-1:]
        class_logits = self.class_predictor(hidden)
        loss = None
        if mask_labels is not None and class_labels is not None:
            masks = _compact(mask_labels, pixel_values)
            terms = self.criterion(embeddings, features, class_logits, masks, class_labels, num_items_in_batch)
            loss = torch.stack(list(terms.values())).sum()
        with torch.set_grad_enabled(torch.is_grad_enabled() and loss is None):
            mask_logits = None if self.training else torch.einsum("bqc,bchw->bqhw", embeddings[-1], features)
        output = Mask2FormerForUniversalSegmentationOutput(
            loss=loss, class_queries_logits=class_logits[-1], masks_queries_logits=mask_logits
        )
        return output if return_dict else output.to_tuple()

    @property
    def encoder(self) -> Encoder:
        """Backbone and neck."""
        encoder: Encoder = self.model.pixel_level_module.encoder
        return encoder

    def normalise(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """Bring uint8 pixels to the backbone's scale on the device, padding to 0; floats pass unchanged."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        scaled = (pixel_values.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std
        return scaled if pixel_mask is None else scaled * pixel_mask.unsqueeze(1)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As transformers', under the names the modules have.

        By default transformers writes a DINOv3 backbone under the names of its first release, which `load_state_dict`,
        and so a resumed Trainer, takes for unknown: the backbone would silently stay as it was.
        """
        self.config.auto_map = {PIPELINE_CLASS: f"{__name__.rsplit('.', 1)[-1]}.{type(self).__name__}"}
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: `_init_weights` leaves loaded weights alone by itself.

        For a class from outside transformers, True, transformers takes every module without parameters of its own for
        loaded and skips it: the original's start of attention and feed-forward layers would silently not happen.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start new layers as the original Mask2Former does, not with transformers' std 0.02."""
        if isinstance(module, M2FModel):
            _torch_linear(module.class_predictor)
            for buffer, values in ((self.pixel_mean, self.config.image_mean), (self.pixel_std, self.config.image_std)):
                init.copy_(buffer, torch.tensor(values).view(1, 3, 1, 1))
            return
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, ChannelNorm, SimplePyramid)):
            _torch_convolution(module)
            return
        super()._init_weights(module)
        if isinstance(module, PixelDecoder):
            _start_pixel_decoder(module)
        elif isinstance(module, Mask2FormerPixelDecoderEncoderLayer):
            _xavier_linears(module.fc1, module.fc2)
        elif isinstance(module, Mask2FormerMaskedAttentionDecoderLayer):
            _start_decoder_layer(module)


def _backbone(config: M2FConfig) -> PreTrainedConfig:
    if not isinstance(config.backbone_config, PreTrainedConfig):
        raise ModelError("the configuration holds no backbone_config: build it with build_model, or load a saved one")
    return config.backbone_config


def _compact(mask_labels: Mapping[str, Tensor] | Sequence[Tensor], pixel_values: Tensor) -> CompactMasks:
    if isinstance(mask_labels, Mapping):
        height, width = pixel_values.shape[-2:]
        boxes, offsets = mask_labels["boxes"].long(), mask_labels["offsets"].long()
        return CompactMasks(mask_labels["values"], boxes, offsets, (height, width))
    return CompactMasks.from_dense(mask_labels)


def _loss_settings(config: M2FConfig) -> LossSettings:
    return LossSettings(
        config.class_weight,
        config.mask_weight,
        config.dice_weight,
        config.no_object_weight,
        config.train_num_points,
        config.oversample_ratio,
        config.importance_sample_ratio,
    )


def _uniform_bias(bias: Tensor | None, fan_in: int) -> None:
    if bias is not None:
        bound = 1 / math.sqrt(fan_in)
        init.uniform_(bias, -bound, bound)


def _torch_linear(linear: nn.Linear) -> None:
    """torch's default, which the original keeps for its class head."""
    init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    _uniform_bias(linear.bias, linear.in_features)


def _torch_convolution(module: nn.Module) -> None:
    """torch's default for the neck's convolutions, as ViTDet's pyramid."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        _uniform_bias(module.bias, module.weight[0].numel())


def _xavier_linears(*linears: nn.Linear) -> None:
    """msdeformattn.py `_reset_parameters`: matrices xavier; biases stay at torch's default."""
    for linear in linears:
        init.xavier_uniform_(linear.weight)
        _uniform_bias(linear.bias, linear.in_features)


def _start_pixel_decoder(decoder: PixelDecoder) -> None:
    """msdeformattn.py: input projections xavier with zero bias; the other convolutions c2_xavier_fill."""
    for projection in decoder.input_projections:
        init.xavier_uniform_(next(projection.children()).weight)  # type: ignore[arg-type]
    filled: list[nn.Sequential] = [*decoder.lateral_convolutions, *decoder.output_convolutions]
    for convolution in (*(sequence[0] for sequence in filled), decoder.mask_projection):
        init.kaiming_uniform_(convolution.weight, a=1)  # type: ignore[arg-type]
    for convolution in (*(next(p.children()) for p in decoder.input_projections), decoder.mask_projection):
        init.zeros_(convolution.bias)  # type: ignore[arg-type]


def _start_decoder_layer(layer: Mask2FormerMaskedAttentionDecoderLayer) -> None:
    """mask2former_transformer_decoder.py: xavier everywhere, attention packed as one (3 C, C) matrix, zero biases."""
    attention = layer.self_attn
    width = attention.embed_dim
    bound = math.sqrt(6 / (width + 3 * width))
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        init.uniform_(linear.weight, -bound, bound)
        init.zeros_(linear.bias)
    for linear in (attention.out_proj, layer.cross_attn.out_proj):
        init.zeros_(linear.bias)
    for linear in (layer.fc1, layer.fc2):
        _uniform_bias(linear.bias, linear.in_features)


def build_model(
    backbone: str | Mapping[str, Any],
    categories: Sequence[Mapping[str, Any]],
    *,
    image_size: tuple[int, int] = (1024, 1024),
    taps: Sequence[int] = (),
    head_checkpoint: str | None = None,
    init_from: str | None = None,
    **config_fields: Any,
) -> M2FModel:
    """Assemble a model to be trained.

    backbone         a table name, Hub id or folder (pretrained weights), or a configuration dictionary (random weights)
    categories       the classes in order, each {"id", "name"}
    image_size       (height, width) of the padded frame
    taps             1-based depths of a ViT that feed the neck; default the last
    head_checkpoint  any Mask2Former checkpoint to take the pixel decoder and transformer decoder from
    init_from        a model of ours to take all weights from, other classes included
    config_fields    fields of `M2FConfig`, such as num_queries, neck, hidden_dim

    Raises ModelError when a part can't be had or doesn't fit.
    """
    _check_fields(config_fields)
    config = M2FConfig(
        backbone_config=read_config(backbone, tuple(taps)),
        backbone_name=backbone if isinstance(backbone, str) else "",
        head_checkpoint=head_checkpoint,
        init_from=init_from,
        image_height=image_size[0],
        image_width=image_size[1],
        **{**(head_fields(head_checkpoint) if head_checkpoint else {}), **config_fields},
        **_label_fields(categories),
    )
    _check_size(_backbone(config), image_size)
    model = M2FModel(config)
    if init_from:
        load_model_weights(model, load_model(init_from))
        return model
    if isinstance(backbone, str):
        load_backbone_weights(model)
    if head_checkpoint:
        load_head(model, head_checkpoint)
    return model


def load_backbone_weights(model: M2FModel) -> None:
    """Fill the backbone with the pretrained weights that the configuration names. Raises ModelError."""
    pretrained = load_pretrained(model.config.backbone_name, _backbone(model.config))
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


def load_model(folder_or_hub_id: str) -> M2FModel:
    """Load a model of ours, ready to predict. No code from the folder is run.

    Raises ModelError when the folder holds no such model.
    """
    try:
        config = AutoConfig.from_pretrained(folder_or_hub_id)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"no model could be read from {folder_or_hub_id!r}: {first}") from error
    if not isinstance(config, M2FConfig):
        raise ModelError(
            f"{folder_or_hub_id!r} holds a {config.model_type!r} model, not one of m2f_trainer's "
            f"({M2FConfig.model_type!r}): give a run's folder, one of its checkpoints, or a Hub id of such a model"
        )
    try:
        model = M2FModel.from_pretrained(folder_or_hub_id, config=config, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the weights in {folder_or_hub_id!r} can't be loaded: {error}") from error
    loaded: M2FModel = model.eval()  # type: ignore[no-untyped-call]
    return loaded


def register() -> None:
    """Tell transformers' Auto classes about this model, and let saved folders carry its code."""
    AutoConfig.register(M2FConfig.model_type, M2FConfig, exist_ok=True)
    for auto_class in (AutoModelForUniversalSegmentation, AutoModelForImageSegmentation):
        auto_class.register(M2FConfig, M2FModel, exist_ok=True)
    M2FConfig.register_for_auto_class("AutoConfig")  # type: ignore[no-untyped-call]
    M2FModel.register_for_auto_class("AutoModelForUniversalSegmentation")  # type: ignore[no-untyped-call]


if __name__.startswith("m2f_trainer."):  # not when this file was loaded from a saved folder as remote code
    register()
