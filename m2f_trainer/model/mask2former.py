"""Mask2Former on a DINO backbone: configuration, assembly, saving and loading. `build.py` builds one to train.

The pixel decoder, transformer decoder and class head keep transformers' names and shapes, so weights can be exchanged
with any Mask2Former checkpoint. This file and the ones it imports are copied into every saved folder, so that the model
loads with `trust_remote_code=True` where m2f_trainer isn't installed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
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
from transformers import initialization as init
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerForUniversalSegmentationOutput,
    Mask2FormerPreTrainedModel,
)

from .backbones import IMAGENET
from .compact_masks import CompactMasks
from .criterion import Criterion, LossSettings
from .encoder import Encoder
from .initialization import NECK_LAYERS, init_class_head, init_head_layer, init_neck_layer
from .pixel_decoder import PixelDecoder
from .quality import QualityHead, seen_queries
from .ranking import rank
from .sources import ModelError, load_config, load_weights, share_weights
from .transformer_decoder import QueryDecoder

AUTO_CLASSES = (AutoModelForUniversalSegmentation, AutoModelForImageSegmentation)  # the latter for pipelines


@strict
class M2FConfig(Mask2FormerConfig):
    """Mask2Former's configuration with the neck, the categories and the image geometry.

    last_norm       whether the last layer's map is normed; false for some converted checkpoints (`original_script`)
    categories      class k is the k-th entry, {"id": the dataset's own id, "name": ...}
    image_height, image_width
                    the padded frame that images are resized to fit into, multiples of the backbone's stride
    discrimination_weight
                    weight of the instance discrimination loss (see `discrimination`); 0: off
    class_weights   weight of each class in the classification loss; None for 1 each
    tile_size, tile_overlap
                    side of the square tiles of evaluation and prediction in original pixels, and the fraction of it
                    that neighbours share; tiles are resized to the frame. None for whole images
    pixel_range     for images of more than 8 bits: the values [low, high] that become 0 and 255, or "image" for
                    percentiles of each image; None: 0 to 65535
    quality_weight  loss weight of the mask quality head, whose IoUs rescore queries (see `quality`); 0: no such head
    matrix_nms      whether Matrix NMS lowers the class logits of duplicates (see `ranking`)
    thresholds      score of the highest F1 of each class on the validation images; None before an evaluation
    image_mean, image_std
                    the normalisation of the images that the backbone was trained with, for values from 0 to 1
    backbone_name   source of the backbone: a table name, Hub id, folder or file; "" for random initialisation
    backbone_licence
                    licence of the backbone's weights where it is known, such as "dinov3-license"
    head_checkpoint, init_from
                    sources of the initial weights, recorded for the licence chain
    """

    model_type = "mask2former_dino"

    neck: str = "adapter"
    neck_channels: list[int] | None = None
    last_norm: bool = True
    categories: list[dict[str, Any]] | None = None
    image_height: int = 1024
    image_width: int = 1024
    discrimination_weight: float = 0.0
    class_weights: list[float] | None = None
    tile_size: int | None = None
    tile_overlap: float = 0.3
    pixel_range: list[float] | tuple[float, float] | str | None = None
    quality_weight: float = 0.0
    matrix_nms: bool = False
    thresholds: list[float] | None = None
    image_mean: list[float] | tuple[float, ...] = IMAGENET[0]
    image_std: list[float] | tuple[float, ...] = IMAGENET[1]
    backbone_name: str = ""
    backbone_licence: str = ""
    head_checkpoint: str | None = None
    init_from: str | None = None

    def validate_architecture(self) -> None:
        """No check: transformers' own would warn about every backbone but Swin."""


class PixelLevelModule(nn.Module):
    """Encoder and pixel decoder, under transformers' names."""

    def __init__(self, config: M2FConfig) -> None:
        super().__init__()
        self.encoder = Encoder(backbone_of(config), config.neck, config.neck_channels, config.last_norm)
        self.decoder = PixelDecoder(config, self.encoder.channels)


class Body(nn.Module):
    """Everything but the class head, under transformers' names."""

    def __init__(self, config: M2FConfig) -> None:
        super().__init__()
        self.pixel_level_module = PixelLevelModule(config)
        self.transformer_module = QueryDecoder(in_features=config.feature_size, config=config)

    def forward(self, pixel_values: Tensor, maps: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised (B, 3, H, W) -> hidden (L, B, Q, C), mask embeddings (L, B, Q, C), features (B, C, H/4, W/4)."""
        features, levels = self.pixel_level_module.decoder(self.pixel_level_module.encoder(pixel_values, maps))
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
        self.quality_predictor = QualityHead() if config.quality_weight else None
        weights = (config.class_weight, config.mask_weight, config.dice_weight, config.no_object_weight)
        points = (config.train_num_points, config.oversample_ratio, config.importance_sample_ratio)
        training_only = (config.discrimination_weight, config.quality_weight)
        of_classes = tuple(config.class_weights or ())
        if len(of_classes) not in (0, classes):
            raise ModelError(f"class_weights: expected {classes} numbers, one a class, got {len(of_classes)}")
        self.criterion = Criterion(classes, LossSettings(*weights, *points, *training_only, of_classes))
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        for name in ("mean", "std"):
            self.register_buffer(f"pixel_{name}", torch.zeros(1, 3, 1, 1), persistent=False)
        self.post_init()  # type: ignore[no-untyped-call]
        self._no_split_modules = sorted({*self._no_split_modules, *layer_classes(self.encoder.backbone)})

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        mask_labels: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        class_labels: Sequence[Tensor] | None = None,
        num_items_in_batch: Tensor | None = None,
        backbone_maps: Sequence[Tensor] | None = None,
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
        backbone_maps (B, C, h, w) each: precomputed backbone features of these images, any float type
        """
        maps = None if backbone_maps is None else [one.to(self.pixel_mean.dtype) for one in backbone_maps]
        hidden, embeddings, features = self.model(self.normalise(pixel_values, pixel_mask), maps)
        if mask_labels is None or class_labels is None:
            hidden, embeddings = hidden[-1:], embeddings[-1:]
        class_logits = self.class_predictor(hidden)
        labelled = mask_labels is not None and class_labels is not None
        mask_logits = quality = loss = None
        if not self.training or self.quality_predictor is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not labelled):
                chosen = embeddings[-1][:, seen_queries(self.training)]
                mask_logits = torch.einsum("bqc,bchw->bqhw", chosen, features)
        if self.quality_predictor is not None:
            quality = self.quality_predictor(mask_logits, features)
        if mask_labels is not None and class_labels is not None:
            masks = CompactMasks.of(mask_labels, pixel_values.shape[-2:])
            terms = self.criterion(
                embeddings, features, class_logits, masks, class_labels, num_items_in_batch, quality_logits=quality
            )
            loss = torch.cat(list(terms.values())).sum()
        ranked = class_logits[-1]
        if mask_logits is not None and not self.training:
            ranked = rank(ranked, mask_logits, quality, self.config.matrix_nms)
        output = Mask2FormerForUniversalSegmentationOutput(
            loss=loss,
            class_queries_logits=ranked,
            masks_queries_logits=None if self.training else mask_logits,
        )
        return output if return_dict else output.to_tuple()

    @property
    def encoder(self) -> Encoder:
        """Backbone and neck."""
        encoder: Encoder = self.model.pixel_level_module.encoder
        return encoder

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: there are no word embeddings. accelerate's FSDP asks for them; transformers' default would raise."""

    def normalise(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """Bring uint8 pixels to the backbone's scale on the device, padding to 0; floats pass unchanged."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        scaled = (pixel_values.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std
        return scaled if pixel_mask is None else scaled * pixel_mask.unsqueeze(1)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As transformers', with tensors under the names of the modules.

        By default transformers writes a DINOv3 backbone under the names of its first release. `load_state_dict`, and so
        a resumed Trainer, does not know those names: the backbone would silently keep its old weights.
        """
        here = f"{__name__.rsplit('.', 1)[-1]}.{M2FModel.__name__}"  # type(self) may be FSDP's
        self.config.auto_map = {auto_class.__name__: here for auto_class in AUTO_CLASSES}
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})
        share_weights(Path(save_directory))

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: `_init_weights` never overwrites loaded weights.

        With True (a class from outside transformers), transformers treats every module without parameters of its own as
        loaded and skips it: attention and feed-forward layers would silently not get the original's initialisation.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise new layers as the original Mask2Former does (see `initialization.py`)."""
        if isinstance(module, M2FModel):
            init_class_head(module.class_predictor)
            if module.quality_predictor is not None:
                module.quality_predictor.initialize()
            for buffer, values in ((self.pixel_mean, self.config.image_mean), (self.pixel_std, self.config.image_std)):
                init.copy_(buffer, torch.tensor(values).view(1, 3, 1, 1))
        elif isinstance(module, NECK_LAYERS):
            init_neck_layer(module)
        else:
            super()._init_weights(module)
            init_head_layer(module)


def backbone_of(config: M2FConfig) -> PreTrainedConfig:
    if not isinstance(config.backbone_config, PreTrainedConfig):
        raise ModelError("the configuration holds no backbone_config: build it with build_model, or load a saved one")
    return config.backbone_config


def layer_classes(backbone: Any) -> set[str]:
    """Class names of the backbone's layers that FSDP shards individually; otherwise a whole ViT is gathered at once."""
    return {type(module).__name__ for module in backbone.modules()} & set(backbone._no_split_modules or ())


def load_model(folder_or_hub_id: str) -> M2FModel:
    """Load an m2f_trainer model in evaluation mode, in float32. No code from the folder is executed.

    Checkpoints of the script DINOv3-Mask2former are converted (see `original_script`).

    Raises ModelError when the folder holds no such model, or its weights are damaged, incomplete or of other shapes.
    """
    try:
        config = load_config(folder_or_hub_id)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"no model could be read from {folder_or_hub_id!r}: {first}") from error
    if isinstance(config, Mask2FormerConfig) and not isinstance(config, M2FConfig):
        from .original_script import load_original  # imports this module

        original = load_original(folder_or_hub_id, config)
        if original is not None:
            return original
    if not isinstance(config, M2FConfig):
        raise ModelError(
            f"{folder_or_hub_id!r} holds a {config.model_type!r} model, not one of m2f_trainer's "
            f"({M2FConfig.model_type!r}): give a run's folder, one of its checkpoints, or a Hub id of such a model"
        )
    try:
        model: M2FModel = load_weights(M2FModel, folder_or_hub_id, config=config)
    except OSError as error:
        raise ModelError(f"the weights in {folder_or_hub_id!r} can't be loaded: {error}") from error
    loaded: M2FModel = model.eval()  # type: ignore[no-untyped-call]
    return loaded


def register() -> None:
    """Register the model with transformers' Auto classes, and include its code in saved folders."""
    AutoConfig.register(M2FConfig.model_type, M2FConfig, exist_ok=True)
    for auto_class in AUTO_CLASSES:
        auto_class.register(M2FConfig, M2FModel, exist_ok=True)
    M2FConfig.register_for_auto_class("AutoConfig")  # type: ignore[no-untyped-call]


if __name__.startswith("m2f_trainer."):  # not when this file was loaded from a saved folder as remote code
    register()
