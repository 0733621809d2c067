"""Settings that affect results, compared on resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.training.checkpointing import fingerprint

MODEL_KEYS = (
    "backbone", "neck", "tune", "num_queries", "pyramid_taps", "lora_rank", "lora_alpha", "lora_dropout",
    "lora_targets", "drop_path", "rope_rescale", "backbone_config", "head_config",
)  # fmt: skip
OTHER_KEYS = (
    "image_height", "image_width", "min_instance_area", "lsj_min_scale", "lsj_max_scale", "horizontal_flip",
    "rotate90", "color_jitter", "copy_paste", "per_device_train_batch_size", "gradient_accumulation_steps",
    "world_size", "seed", "data_seed", "learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps", "optim", "bf16", "fp16",
    "backbone_lr_multiplier", "layer_decay", "head_first_steps", "lr_milestones", "ema_decay",
    "dataloader_drop_last", "categories", "engine", "feature_cache", "train_images", "train_data", "valid_data",
)  # fmt: skip
"""The settings that fingerprint.json held before its fields were derived from the recipe's rows."""

FACTS = {
    "train_images": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": 1,
    "dataloader_drop_last": False, "tune": "lora",
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "now", "expected"),
    [
        (7, {}, 7),
        (7, {"per_device_train_batch_size": 1}, 14),
        (7, {"per_device_train_batch_size": 4}, 4),  # 14 samples: an epoch of 3 steps, and one step
        (5, {"world_size": 2}, 3),
        (6, {"gradient_accumulation_steps": 2}, 3),  # half a step is trained again
        (10, {"train_images": 5, "per_device_train_batch_size": 5}, 4),
    ],
)
def test_a_changed_run_goes_on_at_the_same_sample(step: int, now: dict[str, int], expected: int) -> None:
    assert fingerprint.same_sample(step, FACTS, {**FACTS, **now}) == expected


def test_the_digest_follows_the_annotations_and_not_the_folder(tmp_path: Path) -> None:
    root = write_sample(tmp_path / "a", images=(3, 1, 0))
    shutil.copytree(root, tmp_path / "b")
    other = write_sample(tmp_path / "c", images=(3, 1, 0), seed=1)
    digests = [fingerprint.annotations_digest(load_coco(folder)["train"]) for folder in (root, tmp_path / "b", other)]
    assert digests[0] == digests[1] != digests[2]
    rows = load_coco(root)["train"]
    assert fingerprint.annotations_digest(rows.select([0, 1])) != digests[0]
    assert fingerprint.annotations_digest(rows.select([1, 0, 2])) != digests[0]
    assert fingerprint.annotations_digest(rows.select([0, 1, 2])) == digests[0]


def test_every_setting_of_the_augmentation_counts_and_a_preset_is_what_it_stands_for(tmp_path: Path) -> None:
    splits = load_coco(write_sample(tmp_path, images=(3, 1, 0)))
    categories = categories_of(splits["train"])

    def changed(*options: str) -> set[str]:
        then, now = (
            fingerprint.fingerprint(
                load_recipe(["quickstart", "--dataset_name", "x", *given]), *splits.values(), categories, 3
            )
            for given in ((), options)
        )
        return set(fingerprint.differences(then, now))

    assert changed("--augmentation", "strong") == {"color_jitter", "rotate90", "copy_paste"}
    assert changed("--rotate90", "true", "--min_instance_area", "9") == {"rotate90", "min_instance_area"}
    assert changed("--horizontal_flip", "false", "--lsj_min_scale", "0.5") == {"horizontal_flip", "lsj_min_scale"}
    assert changed("--color_jitter", "0") == set()
    assert changed("--adam_beta2", "0.9", "--adam_epsilon", "1e-6") == {"adam_beta2", "adam_epsilon"}
    assert changed("--train_sampling_strategy", "sequential") == {"train_sampling_strategy"}


def test_the_fingerprints_of_earlier_versions_still_compare(tmp_path: Path) -> None:
    splits = load_coco(write_sample(tmp_path, images=(3, 1, 0)))

    def of(*options: str) -> dict[str, Any]:
        recipe = load_recipe(["quickstart", "--dataset_name", "x", *options])
        return fingerprint.fingerprint(recipe, splits["train"], splits["valid"], categories_of(splits["train"]), 3)

    now = of("--discrimination_weight", "0", "--quality_weight", "0", "--matrix_nms", "false")
    then = {key: now[key] for key in (*MODEL_KEYS, *OTHER_KEYS)}
    assert fingerprint.differences(then, now) == {}
    assert fingerprint.differences(then, of()).keys() == {"discrimination_weight", "quality_weight", "matrix_nms"}
    older = {**now, "head": "original"}
    assert fingerprint.differences(older, now) == {}, "the head's default was its name"
    assert {*MODEL_KEYS, "head", "quality_weight", "categories", "engine"} <= fingerprint.FIXED
