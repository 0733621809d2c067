"""What is trained, and on what: two of the three dataclasses that `HfArgumentParser` understands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from m2f_trainer.errors import RecipeError


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text; a list default is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """What is trained: backbone, neck, head, and which part of the backbone moves."""

    _argument_group_name = "model"

    backbone: str = option("dinov3-vits16plus", "A name of the backbone table, a Hub id or a local folder.")
    neck: Literal["pyramid", "adapter", "plain"] = option(
        "adapter",
        "pyramid: maps at strides 4/8/16/32; adapter: the same with a light convolutional stem on the image, for what "
        "is smaller than a patch; plain: every map at the patch stride.",
    )
    tune: Literal["frozen", "lora", "full"] = option(
        "frozen", "How the backbone is trained. Neck and head are always trained."
    )
    head_checkpoint: str | None = option(
        None, "A Mask2Former checkpoint (Hub id or folder) whose pixel and transformer decoders start the head."
    )
    init_from: str | None = option(None, "A model of ours to start a new run from; the classes may differ.")
    num_queries: int = option(100, "Queries, so the most instances that one image can have.")
    pyramid_taps: list[int] | None = option(
        None, "Backbone layers the neck reads, from 1. Default: four, evenly, or those of init_from."
    )
    drop_path: float = option(
        0.0, "Share of images that skip the backbone's last layer in training; earlier ones less."
    )
    rope_rescale: float | None = option(
        None, "Scale DINOv3's positions by a random factor up to this in training, as its pretraining did with 2."
    )
    lora_rank: int = option(16, "Rank of the LoRA matrices.")
    lora_alpha: int = option(32, "LoRA scale; the update is multiplied by lora_alpha / lora_rank.")
    lora_dropout: float = option(0.0, "Dropout in front of the LoRA matrices.")
    lora_targets: Literal["attention", "attention+mlp"] = option("attention", "Backbone layers that get LoRA matrices.")
    feature_cache: int | None = option(
        None,
        "With tune frozen: run the backbone once for each of so many fixed views of an image and keep its maps "
        "on disk. Faster steps; fewer augmentations.",
    )
    backbone_config: dict[str, Any] | str | None = option(
        None, "A transformers configuration (with its model_type) for a small, randomly initialised backbone."
    )
    head_config: dict[str, Any] | str | None = option(
        None, "Mask2FormerConfig fields to set, such as hidden_dim, encoder_layers or decoder_layers."
    )

    def __post_init__(self) -> None:
        check_ranges(self, {"num_queries": (1, None), "lora_rank": (1, None), "lora_alpha": (1, None)})
        check_ranges(self, {"lora_dropout": (0, 1), "drop_path": (0, 0.9), "rope_rescale": (1, None)})
        check_ranges(self, {"feature_cache": (1, None)})
        if self.feature_cache is not None and self.tune != "frozen":
            raise RecipeError(
                f"feature_cache={self.feature_cache} keeps what a frozen backbone made of the images, and tune "
                f"{self.tune!r} changes the backbone at each step. Set tune to frozen, or feature_cache to null."
            )
        if self.head_checkpoint and self.init_from:
            raise RecipeError("head_checkpoint and init_from are both set, and each starts the head. Keep one of them.")


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {"lsj_min_scale": 1.0, "lsj_max_scale": 1.0, "horizontal_flip": False},
    "light": {"lsj_min_scale": 0.8, "lsj_max_scale": 1.25, "color_jitter": 0.2},
    "lsj": {},
    "strong": {"color_jitter": 0.4, "rotate90": True, "copy_paste": 0.5},
}
"""Preset -> what it sets other than `lsj`, the original Mask2Former's."""

_LSJ = {
    "lsj_min_scale": 0.1,
    "lsj_max_scale": 2.0,
    "horizontal_flip": True,
    "rotate90": False,
    "color_jitter": 0.0,
    "copy_paste": 0.0,
}


@dataclass
class DataArguments:
    """What it is trained on: a dataset, the size images are brought to, and the augmentation."""

    _argument_group_name = "data"

    dataset_name: str | None = option(None, "Folder of a COCO or YOLO dataset, or a dataset on the Hub: user/name.")
    image_height: int = option(1024, "Height images are resized and padded to; a multiple of the patch size.")
    image_width: int = option(1024, "Width images are resized and padded to; a multiple of the patch size.")
    augmentation: Literal["none", "light", "lsj", "strong"] = option(
        "lsj", "Preset of the six fields below; each can be set by itself too. none never mirrors."
    )
    lsj_min_scale: float | None = option(None, "Large-scale jitter: smallest factor an image is scaled by.")
    lsj_max_scale: float | None = option(None, "Large-scale jitter: largest factor an image is scaled by.")
    horizontal_flip: bool = option(True, "Mirror half of the images; false where left and right matter.")
    rotate90: bool | None = option(None, "Turn images by random quarter turns.")
    color_jitter: float | None = option(None, "Strength of random brightness, contrast and saturation; 0 is off.")
    copy_paste: float | None = option(None, "Share of images that get instances of another image; 0 is off.")
    min_instance_area: int = option(1, "Training instances of fewer pixels at the input size are left out.")
    max_train_samples: int | None = option(None, "Use the first so many training images only.")
    max_eval_samples: int | None = option(None, "Use the first so many validation and test images only.")

    def __post_init__(self) -> None:
        check_ranges(self, {"image_height": (1, None), "image_width": (1, None), "min_instance_area": (1, None)})
        check_ranges(self, {"color_jitter": (0, 1), "copy_paste": (0, 1)})
        check_ranges(self, {"max_train_samples": (1, None), "max_eval_samples": (1, None)})
        check_ranges(self, {"lsj_min_scale": (0.01, self.augment()["lsj_max_scale"]), "lsj_max_scale": (0.01, 10)})

    def augment(self) -> dict[str, Any]:
        """The six augmentation fields with the preset's values where they are not set."""
        preset = {**_LSJ, **AUGMENTATIONS.get(self.augmentation, {})}
        given = {key: vars(self)[key] for key in preset if vars(self)[key] is not None}
        return {**preset, **given, "horizontal_flip": preset["horizontal_flip"] and self.horizontal_flip}


def check_ranges(arguments: object, ranges: Mapping[str, tuple[float, float | None]]) -> None:
    """Raise RecipeError unless each named field is no number (None, "auto") or between its bounds, both allowed."""
    for name, (low, high) in ranges.items():
        value = vars(arguments)[name]
        if isinstance(value, int | float) and not low <= value <= (value if high is None else high):
            wanted = f"at least {low}" if high is None else f"between {low} and {high}"
            raise RecipeError(f"{name}: expected {wanted}, got {value}.")
