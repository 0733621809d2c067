"""The help of a recipe's fields: by theme, with what each takes, its default and one sentence."""

import textwrap
from dataclasses import MISSING, fields

from m2f_trainer.config.recipe import GROUPS, describe_field

THEMES = {
    "data": (
        "dataset_name", "image_height", "image_width", "min_instance_area", "max_train_samples", "max_eval_samples",
    ),
    "augmentation": (
        "augmentation", "lsj_min_scale", "lsj_max_scale", "horizontal_flip", "rotate90", "color_jitter", "copy_paste",
    ),
    "model": (
        "backbone", "tune", "neck", "num_queries", "head_checkpoint", "init_from", "pyramid_taps", "drop_path",
        "rope_rescale", "feature_cache", "backbone_config", "head_config",
    ),
    "LoRA (with --tune lora)": ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    "length and batch": (
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
        "early_stopping_patience", "seed",
    ),
    "learning rate": (
        "learning_rate", "lr_scheduler_type", "lr_milestones", "warmup_steps", "backbone_lr_multiplier", "layer_decay",
        "head_first_steps", "weight_decay", "max_grad_norm", "ema_decay",
    ),
    "saving, evaluation and resumption": (
        "output_dir", "checkpointing_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model",
        "greater_is_better", "resume_from_checkpoint", "allow_changes", "overwrite_output_dir",
        "restore_callback_states_from_checkpoint",
    ),
    "machine": (
        "bf16", "gradient_checkpointing", "per_device_eval_batch_size", "dataloader_num_workers",
        "dataloader_persistent_workers", "dataloader_timeout", "fsdp", "ddp_find_unused_parameters",
    ),
    "logs and uploads": ("logging_steps", "report_to", "push_to_hub", "hub_model_id", "hub_strategy"),
    "not to be changed": ("remove_unused_columns", "label_names", "logging_nan_inf_filter"),
}  # fmt: skip

OTHERS = {
    "max_steps": "Optimiser steps, instead of epochs; -1 goes by epochs.",
    "gradient_accumulation_steps": "Batches a device adds up before it makes one step of them.",
    "seed": "Decides every random number of the run.",
    "gradient_checkpointing": "Compute activations twice instead of keeping them: less memory, more time.",
    "push_to_hub": "Upload the model to the Hugging Face Hub; the token comes from HF_TOKEN.",
    "hub_model_id": "Where to: name/model. Default: the name of output_dir.",
}
"""Fields of transformers that most runs touch, in our words."""

WORDS = {
    "a string": "TEXT", "a whole number": "N", "a number": "X", "an object": "JSON", "true or false": "true|false",
    "a list of strings": "TEXT ...", "a list of whole numbers": "N ...", "a list of numbers": "X ...",
}  # fmt: skip
COLUMN, WIDTH = 38, 110


def describe_fields() -> str:
    """Help for every field of ours, by theme, and where to read on about the rest."""
    lines = [line for theme, names in THEMES.items() for line in ("", f"{theme}:", *map(describe, names))]
    return "\n".join([*lines[1:], "", "Every other field of transformers.TrainingArguments goes under its own name."])


def describe(name: str) -> str:
    """One field: what it takes on the left, what it does on the right, its default at the end."""
    one = next(one for group in GROUPS for one in fields(group) if one.name == name)
    default = "" if one.default in (None, MISSING) else f" [{plain(one.default)}]"
    told = textwrap.wrap((OTHERS.get(name) or one.metadata["help"]) + default, WIDTH - COLUMN)
    left = f"  --{name} {takes(name)}"
    first = [left.ljust(COLUMN) + told.pop(0)] if len(left) < COLUMN else [left]
    return "\n".join([*first, *(" " * COLUMN + line for line in told)])


def takes(name: str) -> str:
    """What a field takes, as usage lines say it."""
    text = describe_field(name).replace('"', "")
    for words, short in sorted(WORDS.items(), key=lambda item: -len(item[0])):
        text = text.replace(words, short)
    return "|".join(part for part in text.split(" or ") if part != "null")


def plain(default: object) -> str:
    """A default as it is typed."""
    return str(default).lower() if isinstance(default, bool) else str(default)
