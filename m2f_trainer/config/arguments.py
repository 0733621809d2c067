"""Recipe fields of the model and the data: two of the three dataclasses of a recipe."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from m2f_trainer.config.fields import check_ranges, option
from m2f_trainer.errors import RecipeError
from m2f_trainer.model.sources import LIMITS

ExifFrame: TypeAlias = Literal["auto", "stored", "displayed"]

PixelRange: TypeAlias = tuple[float, float] | Literal["image"] | None
"""Values that become 0 and 255, or percentiles of each image; None: the full range of the format."""


def parse_pixel_range(text: str) -> PixelRange | Literal["auto"]:
    """`auto`, `image`, or two numbers such as `0,4095`. Raises RecipeError.

    >>> parse_pixel_range("0,4095")
    (0.0, 4095.0)
    """
    if text in ("auto", "image"):
        return "auto" if text == "auto" else "image"
    parts = re.split(r"[,\s]+", text.strip("[]() "))
    try:
        low, high = map(float, parts)
    except ValueError:
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise RecipeError(
            f"pixel_range: expected auto, image, or the values of black and white such as 0,4095, got {text!r}."
        )
    return low, high


def pixel_range_text(pixel_range: PixelRange) -> str:
    """The inverse of `parse_pixel_range`; None is auto, which finds the range where one is needed."""
    if pixel_range is None or pixel_range == "image":
        return pixel_range or "auto"
    return ",".join(f"{value:.15g}" for value in pixel_range)


@dataclass
class ModelArguments:
    """The model: backbone, neck, head, and which weights of the backbone are trained.

    Raises:
        RecipeError: a number is out of range, or two fields contradict each other.
    """

    backbone: str = option(
        "dinov3-vits16plus",
        "Pretrained backbone: a name from the backbone table, a Hub id, a local folder, or a file of weights (Meta's "
        ".pth or timm's .safetensors). With init_from, that of the model there.",
        "model",
        defines_model=True,
    )
    tune: Literal["frozen", "lora", "full"] = option(
        "frozen",
        "How the backbone is trained: not at all (frozen), LoRA matrices only, or all weights. Neck and head are "
        "always trained.",
        "model",
        defines_model=True,
    )
    neck: Literal["pyramid", "adapter", "top_down", "plain"] | None = option(
        None,
        "pyramid: feature maps at strides 4, 8, 16 and 32; adapter: the same plus a light convolutional stem on the "
        "image, for objects smaller than a patch; top_down: a stem, and maps that convolutions join, for heads without "
        "deformable attention; plain: every map at the patch stride. Default: top_down for the heads light and tiny, "
        "that of init_from, else adapter.",
        "model",
        defines_model=True,
    )
    head: Literal["original", "light", "tiny"] | None = option(
        None,
        "Widths, layers and loss points of neck, pixel decoder and transformer decoder. original: as in the paper; "
        "light: a tenth of its cost, for CPUs and small datasets; tiny: half of that. head_config changes single ones. "
        "Default: those of init_from or head_checkpoint, else original.",
        "model",
        defines_model=True,
        before="original",
    )
    num_queries: int = option(
        100,
        "Number of queries: the maximum instances per image or tile. auto: as many as the training split needs.",
        "model",
        at_least=1,
        at_most=LIMITS["num_queries"],
        auto=True,
        defines_model=True,
    )
    head_checkpoint: str | None = option(
        None,
        "Initialise pixel and transformer decoder from this Mask2Former or OneFormer of transformers, from a model of "
        "this package, or from a folder that save_head wrote (Hub id or folder).",
        "model",
    )
    init_from: str | None = option(
        None,
        "Initialise a new run from a model trained by this package, or by the script it is modelled on; its classes "
        "may differ.",
        "model",
    )
    pyramid_taps: list[int] | None = option(
        None,
        "Backbone layers that the neck reads, counted from 1; later layers are left out. Default: four evenly spaced "
        "layers, or those of init_from.",
        "model",
        defines_model=True,
    )
    drop_path: float = option(
        0.0,
        "Stochastic depth: probability of skipping the backbone's last layer in training, decreasing linearly towards "
        "the first.",
        "model",
        at_least=0,
        at_most=0.9,
        defines_model=True,
    )
    rope_rescale: float | None = option(
        None,
        "Multiply DINOv3's position coordinates by a random factor between 1/X and X in training. DINOv3 was "
        "pretrained with 2.",
        "model",
        at_least=1,
        defines_model=True,
    )
    recompute_feed_forward: bool = option(
        True,
        "Compute the feed-forward layers of the pixel decoder again in the backward pass. At 1024 x 1024 in bf16: "
        "0.26 GB less memory for each image; by the model of a GPU in benchmarks/roofline.py 0.4 ms more time.",
        "precision and memory",
    )
    feature_cache: int | None = option(
        None,
        "With tune frozen: precompute backbone features for N augmented views of each image and keep them on disk. "
        "Steps are faster; only N augmentations of an image are ever seen. A run ends with an error at its start if "
        "this would take more than half of max_minutes. 0 turns it off.",
        "model",
        at_least=0,
        changes_results=True,
    )
    discrimination_weight: float = option(
        5.0,
        "Weight of the instance discrimination loss, which separates objects by their mask features in training; 0 "
        "turns it off.",
        "model",
        at_least=0,
        changes_results=True,
        before=0.0,
    )
    quality_weight: float = option(
        2.0,
        "Loss weight of a small head that predicts each mask's IoU, by which predictions are ranked; 0: no such head. "
        "Meant for use with matrix_nms: without it, duplicates rank high.",
        "model",
        at_least=0,
        defines_model=True,
        before=0.0,
    )
    class_weights: dict[str, Any] | str | None = option(
        None,
        'Class weights in the classification loss: {"name": weight}, 1 for those not named; or balanced: proportional '
        "to 1 / sqrt(objects), 1 on average over the objects. Default: 1 each.",
        "model",
        changes_results=True,
    )
    matrix_nms: bool = option(
        True,
        "Predictions that overlap better ones of their class lose score (Matrix NMS), in the model's class logits.",
        "model",
        changes_results=True,
        before=False,
    )
    backbone_config: dict[str, Any] | str | None = option(
        None,
        "A transformers configuration (with model_type) of a small, randomly initialised backbone.",
        "model",
        defines_model=True,
    )
    head_config: dict[str, Any] | str | None = option(
        None,
        "Mask2FormerConfig fields to override, such as hidden_dim, encoder_layers or decoder_layers.",
        "model",
        defines_model=True,
    )

    lora_rank: int = option(16, "Rank of the LoRA matrices.", "LoRA (with --tune lora)", at_least=1, defines_model=True)
    lora_alpha: int = option(
        32,
        "LoRA scale: updates are multiplied by lora_alpha / lora_rank.",
        "LoRA (with --tune lora)",
        at_least=1,
        defines_model=True,
    )
    lora_dropout: float = option(
        0.0,
        "Dropout probability on the input of the LoRA matrices.",
        "LoRA (with --tune lora)",
        at_least=0,
        at_most=1,
        defines_model=True,
    )
    lora_targets: Literal["attention", "attention+mlp"] = option(
        "attention", "Backbone layers that get LoRA matrices.", "LoRA (with --tune lora)", defines_model=True
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check_class_weights()
        if self.feature_cache and self.tune != "frozen":
            raise RecipeError(
                f"feature_cache={self.feature_cache} stores the features of a frozen backbone, but tune={self.tune} "
                "changes the backbone at every step. Set tune to frozen, or feature_cache to 0."
            )
        if self.head_checkpoint and self.head not in (None, "original"):
            raise RecipeError(
                f"head={self.head} and head_checkpoint contradict each other: widths and layers are those of the "
                "checkpoint. Leave head out."
            )
        if self.head_checkpoint and self.init_from:
            raise RecipeError(
                "head_checkpoint and init_from are both set, and both initialise the head. Keep one of them."
            )

    def _check_class_weights(self) -> None:
        given = self.class_weights
        weights = list(given.values()) if isinstance(given, dict) else []
        valid = isinstance(given, dict) and all(type(weight) in (int, float) and weight > 0 for weight in weights)
        if given is not None and given != "balanced" and not valid:
            raise RecipeError(
                'class_weights: expected "balanced", or an object of class names and numbers above 0 such as '
                f'{{"name": 2}}, got {given!r}.'
            )


HEADS: dict[str, dict[str, Any]] = {
    "original": {
        "neck": "adapter", "neck_channels": None, "hidden_dim": 256, "feature_size": 256, "mask_feature_size": 256,
        "encoder_layers": 6, "encoder_feedforward_dim": 1024, "decoder_layers": 10, "dim_feedforward": 2048,
        "num_attention_heads": 8, "train_num_points": 12544,
    },
    "light": {
        "neck": "top_down", "neck_channels": [64, 96, 128, 128], "hidden_dim": 96, "feature_size": 96,
        "mask_feature_size": 96, "encoder_layers": 0, "encoder_feedforward_dim": 256, "decoder_layers": 4,
        "dim_feedforward": 256, "num_attention_heads": 6, "train_num_points": 1024,
    },
    "tiny": {
        "neck": "top_down", "neck_channels": [48, 64, 96, 96], "hidden_dim": 64, "feature_size": 64,
        "mask_feature_size": 64, "encoder_layers": 0, "encoder_feedforward_dim": 128, "decoder_layers": 4,
        "dim_feedforward": 128, "num_attention_heads": 4, "train_num_points": 512,
    },
}  # fmt: skip
"""Head -> the fields of `M2FConfig` that it sets."""

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {"lsj_min_scale": 1.0, "lsj_max_scale": 1.0, "horizontal_flip": False},
    "light": {"lsj_min_scale": 0.8, "lsj_max_scale": 1.25, "color_jitter": 0.2},
    "lsj": {},
    "strong": {"color_jitter": 0.4, "rotate90": True, "copy_paste": 0.5},
}
"""Preset -> how it differs from `lsj`, the large-scale jitter of the original Mask2Former."""

_LSJ = {
    "lsj_min_scale": 0.1,
    "lsj_max_scale": 2.0,
    "horizontal_flip": True,
    "rotate90": False,
    "color_jitter": 0.0,
    "copy_paste": 0.0,
}

_TILES = {"lsj_min_scale": 1.0, "lsj_max_scale": 1.0}
"""Tiles keep the scale of the images, at which the model is used: jitter costs AP in short runs (recipes/README.md)."""


@dataclass
class DataArguments:
    """The data: dataset, image size, augmentation.

    Raises:
        RecipeError: a number is out of range, or two fields contradict each other.
    """

    dataset_name: str | None = option(
        None,
        "Folder of a dataset (COCO, YOLO and others), its annotation file or data.yaml, or a dataset on the Hub: "
        "user/name.",
        "data",
    )
    annotations: list[str] | None = option(
        None,
        "Annotation file of each split as SPLIT=FILE, with paths relative to the dataset folder. Default: those found.",
        "data",
    )
    images: list[str] | None = option(
        None,
        "Image folder of splits as SPLIT=FOLDER, with paths relative to the dataset folder. Default: those found.",
        "data",
    )
    exif_frame: ExifFrame = option(
        "auto",
        "Whether masks of photos with an EXIF rotation lie on the stored pixels or on the photo as viewers display it. "
        "auto: decided by the annotated sizes, and an error where they don't decide.",
        "data",
        changes_results=True,
    )
    follow_links: bool = option(
        False,
        "Read images that are links to files outside of the dataset folder, as DVC, git-annex and caches make them. "
        "Only for a dataset whose links are your own: a link can show any file of this machine.",
        "data",
    )
    max_pixels: int | None = option(
        None,
        "Highest number of pixels of an image; larger ones may be decompression bombs and are refused. Default: "
        "89,478,485.",
        "data",
        at_least=1,
        at_most=2**31 - 1,
    )
    pixel_range: str = option(
        "auto",
        "For images of more than 8 bits: the values that become black and white, such as 0,4095; image: the 0.1th and "
        "99.9th percentile of each image; auto: those of the training images. Stored in the model.",
        "data",
        json_type=list,
        changes_results=True,
    )
    image_height: int = option(
        1024,
        "Height that images are resized and padded to, in pixels; a multiple of the patch size.",
        "data",
        at_least=1,
        at_most=LIMITS["image_height"],
        changes_results=True,
    )
    image_width: int = option(
        1024,
        "Width that images are resized and padded to, in pixels; a multiple of the patch size.",
        "data",
        at_least=1,
        at_most=LIMITS["image_width"],
        changes_results=True,
    )
    tile_size: int | None = option(
        None,
        "Train on square tiles of the images, N original pixels a side, for small or many objects; evaluation and "
        "prediction tile by themselves. A tile is resized to image_height x image_width, by default to its own size.",
        "data",
        at_least=8,
        changes_results=True,
    )
    eval_tile_size: int | None = option(
        None,
        "Side of the tiles in evaluation and prediction. Smaller tiles than in training are enlarged more, which finds "
        "more small objects and takes longer. Default: tile_size.",
        "data",
        at_least=8,
        changes_results=True,
    )
    tile_overlap: float = option(
        0.3,
        "Fraction of a tile that is shared with its neighbours in evaluation and prediction.",
        "data",
        at_least=0,
        at_most=0.49,
        changes_results=True,
    )
    empty_tiles: float = option(
        0.1,
        "Maximum fraction of training tiles without objects.",
        "data",
        at_least=0,
        at_most=0.9,
        changes_results=True,
    )
    tiles_per_image: int | None = option(
        None,
        "Maximum tiles with objects that an epoch uses of one image; over the epochs all are used. Default: all.",
        "data",
        at_least=1,
        changes_results=True,
    )
    min_instance_area: int = option(
        1,
        "Drop training instances with fewer pixels than this at the input size.",
        "data",
        at_least=1,
        changes_results=True,
    )
    repeat_factor_threshold: float | None = option(
        None,
        "Repeat training images or tiles with rare classes: a class in less than this fraction of them is shown "
        "sqrt(threshold / fraction) times as often (repeat-factor sampling of LVIS, which uses 0.001). Default: off.",
        "data",
        at_least=0,
        at_most=1,
        changes_results=True,
    )
    max_train_samples: int | None = option(None, "Train on the first N images only.", "data", at_least=1)
    max_eval_samples: int | None = option(
        None, "Evaluate on the first N images of the validation and test split only.", "data", at_least=1
    )

    augmentation: Literal["none", "light", "lsj", "strong"] = option(
        "lsj",
        "Preset of the six fields below, each of which can also be set. With none, images are never flipped.",
        "augmentation",
    )
    lsj_min_scale: float | None = option(
        None,
        "Large-scale jitter: smallest factor an image is scaled by [0.1; with tile_size 1].",
        "augmentation",
        at_least=0.01,
        at_most=10,
        changes_results=True,
    )
    lsj_max_scale: float | None = option(
        None,
        "Large-scale jitter: largest factor an image is scaled by [2; with tile_size 1].",
        "augmentation",
        at_least=0.01,
        at_most=10,
        changes_results=True,
    )
    horizontal_flip: bool = option(
        True,
        "Flip images left to right with probability 0.5. Set false where left and right matter.",
        "augmentation",
        changes_results=True,
    )
    rotate90: bool | None = option(
        None, "Rotate images by a random multiple of 90 degrees.", "augmentation", changes_results=True
    )
    color_jitter: float | None = option(
        None,
        "Strength of random brightness, contrast and saturation changes; 0 turns them off.",
        "augmentation",
        at_least=0,
        at_most=1,
        changes_results=True,
    )
    copy_paste: float | None = option(
        None,
        "Probability of pasting instances of another image into an image; 0 turns it off.",
        "augmentation",
        at_least=0,
        at_most=1,
        changes_results=True,
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        parse_pixel_range(self.pixel_range)
        if self.eval_tile_size and not self.tile_size:
            raise RecipeError(
                f"eval_tile_size={self.eval_tile_size} needs tile_size: a model that is trained on whole images is "
                "evaluated on whole images. Give tile_size too, or leave eval_tile_size out."
            )
        augment = self.augment()
        if augment["lsj_min_scale"] > augment["lsj_max_scale"]:
            raise RecipeError(
                f"lsj_min_scale: expected at most lsj_max_scale={augment['lsj_max_scale']}, "
                f"got {augment['lsj_min_scale']}."
            )

    def augment(self) -> dict[str, Any]:
        """The six augmentation fields, with the preset's values where they are not set."""
        preset = {**_LSJ, **(_TILES if self.tile_size else {}), **AUGMENTATIONS.get(self.augmentation, {})}
        given = {key: vars(self)[key] for key in preset if vars(self)[key] is not None}
        return {**preset, **given, "horizontal_flip": preset["horizontal_flip"] and self.horizontal_flip}
