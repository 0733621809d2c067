"""The recipe that is chosen for a dataset and a machine."""

import json
from pathlib import Path

import pytest

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.recommend import (
    Facts,
    Machine,
    as_recipe,
    choices_text,
    facts_of,
    images_of_rows,
    images_of_scans,
    recommend,
)
from tests.data.folders import annotation, content, write
from tests.model.tiny import VIT

LAPTOP, SERVER = Machine(accelerator=False, token=False), Machine(accelerator=True, token=True)
NUCLEI = Facts(images=464, most=375, object_side=17, large_side=17, image_side=320, pixels=90_000_000)
STREETS = Facts(images=407, most=122, object_side=33, large_side=406, image_side=512, pixels=107_000_000)


def test_small_objects_are_trained_on_tiles_and_large_ones_on_whole_images() -> None:
    tiles, whole = as_recipe(recommend(NUCLEI, LAPTOP)), as_recipe(recommend(STREETS, LAPTOP))
    assert (tiles["tile_size"], tiles["image_height"], tiles["pyramid_taps"]) == (80, 112, [2, 4, 6])
    assert not whole.keys() & {"tile_size", "pyramid_taps"}
    assert (tiles["per_device_train_batch_size"], whole["per_device_train_batch_size"]) == (8, 4)
    assert (tiles["per_device_eval_batch_size"], whole.get("per_device_eval_batch_size")) == (16, None)
    large = as_recipe(recommend(STREETS, LAPTOP, {"tile_size": 512}))
    assert "per_device_eval_batch_size" not in large, "16 large tiles might not fit in memory"


@pytest.mark.parametrize("facts", [NUCLEI, STREETS])
@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
def test_what_is_chosen_is_a_recipe_that_loads(facts: Facts, machine: Machine, tmp_path: Path) -> None:
    choices = recommend(facts, machine)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(as_recipe(choices)))
    recipe = load_recipe([str(path), "--dataset_name", "x"])
    for choice in choices:
        assert choice.reason
        assert choice.field in choices_text(choices)
    assert recipe.data.image_height % (14 if machine == LAPTOP else 16) == 0


def test_a_laptop_gets_an_open_backbone_and_a_bounded_run_and_a_server_the_default() -> None:
    laptop, server = as_recipe(recommend(NUCLEI, LAPTOP)), as_recipe(recommend(NUCLEI, SERVER))
    assert (laptop["backbone"], laptop["tune"], laptop["max_minutes"]) == ("dinov2-small", "lora", 60)
    assert as_recipe(recommend(NUCLEI, LAPTOP, {"max_minutes": 3}))["tune"] == "frozen"
    assert as_recipe(recommend(STREETS, LAPTOP))["tune"] == "frozen"
    assert (server["backbone"], server["tune"]) == ("dinov3-vits16plus", "lora")


def test_a_server_without_a_hub_token_gets_the_same_weights_where_no_access_is_needed() -> None:
    choices = recommend(NUCLEI, Machine(accelerator=True, token=False))
    assert as_recipe(choices) == {
        **as_recipe(recommend(NUCLEI, SERVER)),
        "backbone": "timm/vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
    }
    assert "no Hub token" in choices[0].reason
    assert "DINOv3 licence" in choices[0].reason


def test_sides_fit_the_backbone_of_a_script_checkpoint_that_a_run_starts_from() -> None:
    """Its backbone, a DINOv3 with patches of 16 pixels, is not the one that would be chosen for a new run."""
    chosen = as_recipe(recommend(NUCLEI, LAPTOP, {"init_from": "step_200_model"}))
    assert "backbone" not in chosen
    assert chosen["image_height"] % 16 == 0
    assert as_recipe(recommend(NUCLEI, LAPTOP))["image_height"] % 14 == 0


def test_a_cpu_that_is_faster_in_bfloat16_trains_in_it() -> None:
    fast = Machine(accelerator=False, token=False, bf16=True)
    assert as_recipe(recommend(NUCLEI, fast))["bf16"] is True
    assert "bf16" not in as_recipe(recommend(NUCLEI, LAPTOP))
    assert "bf16" not in as_recipe(recommend(NUCLEI, fast, {"fp16": True}))


def test_features_are_kept_on_disk_where_a_run_uses_them_several_times() -> None:
    few = Facts(images=20, most=5, object_side=100, large_side=100, image_side=300, pixels=1_800_000)
    assert "feature_cache" not in as_recipe(recommend(NUCLEI, LAPTOP, {"max_minutes": 5}))
    for given, views, times in (  # 4 images a step
        ({"max_steps": 36}, 2, 4),
        ({"num_train_epochs": 9}, 2, 4),
        ({"max_steps": 74}, 2, 7),
        ({"max_steps": 75}, 5, 3),
        ({"max_steps": 600}, 6, 20),
    ):
        (choice,) = (choice for choice in recommend(few, LAPTOP, given) if choice.field == "feature_cache")
        assert choice.value == views
        assert choice.reason.endswith(f"used about {times} times each")
    for given in ({"max_steps": 29}, {"num_train_epochs": 5.0}, {"max_minutes": 20, "feature_cache": 0}):
        assert "feature_cache" not in as_recipe(recommend(few, LAPTOP, given))


def test_photos_that_are_shown_many_times_are_jittered_and_kept_in_more_views() -> None:
    """407 photos of 336 x 336, 2.6e-6 CPU s a pixel: 3600 / 0.294 / 407 = 30 passes an hour, 10 in 20 minutes."""
    hour, short = as_recipe(recommend(STREETS, LAPTOP)), as_recipe(recommend(STREETS, LAPTOP, {"max_minutes": 20}))
    assert (hour["lsj_min_scale"], hour["lsj_max_scale"], hour["feature_cache"]) == (0.8, 1.3, 6)
    assert (short["lsj_min_scale"], short["lsj_max_scale"], short["feature_cache"]) == (1.0, 1.0, 2)
    plain = as_recipe(recommend(STREETS, LAPTOP, {"augmentation": "none"}))
    assert plain["feature_cache"] == 2
    assert "lsj_min_scale" not in plain
    assert as_recipe(recommend(NUCLEI, LAPTOP, {"max_minutes": 600}))["lsj_max_scale"] == 1.0


def test_tiles_of_evaluation_are_smaller_on_a_cpu_unless_the_user_chose_the_tiles() -> None:
    chosen = as_recipe(recommend(NUCLEI, LAPTOP))
    assert (chosen["tile_size"], chosen["eval_tile_size"]) == (80, 64)
    assert "eval_tile_size" not in as_recipe(recommend(NUCLEI, SERVER))
    assert "eval_tile_size" not in as_recipe(recommend(NUCLEI, LAPTOP, {"tile_size": 96}))
    assert "eval_tile_size" not in as_recipe(recommend(STREETS, LAPTOP))


@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
def test_objects_are_pasted_onto_tiles_unless_the_user_chose_an_augmentation(machine: Machine) -> None:
    assert as_recipe(recommend(NUCLEI, machine))["copy_paste"] == 0.5
    assert "copy_paste" not in as_recipe(recommend(STREETS, machine))
    for given in ({"augmentation": "none"}, {"copy_paste": 0.0}):
        assert "copy_paste" not in as_recipe(recommend(NUCLEI, machine, given))


def test_given_fields_are_kept_and_nothing_contradicts_them() -> None:
    given = {"tune": "lora", "max_steps": 10, "backbone_config": {**VIT, "patch_size": 16}}
    chosen = as_recipe(recommend(NUCLEI, LAPTOP, given))
    assert not chosen.keys() & {"tune", "feature_cache", "max_minutes", "backbone"}
    assert chosen["image_height"] % 16 == 0
    assert as_recipe(recommend(STREETS, LAPTOP, {"tile_size": 256}))["image_height"] == 364
    assert "pyramid_taps" not in as_recipe(recommend(NUCLEI, LAPTOP, {"backbone": "dinov3-convnext-tiny"}))
    assert as_recipe(recommend(NUCLEI, LAPTOP, {"backbone": "dinov2-large"}))["pyramid_taps"] == [4, 8, 12]


def test_a_tile_size_of_none_means_whole_images() -> None:
    """Images of 320 pixels: 23 patches of 14 are 322."""
    whole = as_recipe(recommend(NUCLEI, LAPTOP, {"tile_size": None}))
    assert (whole["image_height"], whole["image_width"], whole["tune"]) == (322, 322, "frozen")
    assert not whole.keys() & {"tile_size", "eval_tile_size", "pyramid_taps", "copy_paste"}


def test_a_head_with_a_changed_setting_is_still_the_one_for_the_machine() -> None:
    assert as_recipe(recommend(NUCLEI, LAPTOP, {"head_config": {"encoder_layers": 1}}))["head"] == "light"


def test_objects_are_measured_in_pixels_of_the_original_image(tmp_path: Path) -> None:
    rows = load_coco(write_sample(tmp_path / "set", images=(6, 2, 0)))["train"]
    facts = facts_of(images_of_rows(rows))
    assert facts_of(images_of_scans(examine(tmp_path / "set").scans["train"])) == facts
    areas = sorted(one["area"] for row in rows for one in row["objects"] if not one["iscrowd"])
    assert facts.images == 6
    assert facts.pixels == sum(row["height"] * row["width"] for row in rows)
    assert facts.most == max(sum(not one["iscrowd"] for one in row["objects"]) for row in rows)
    middle = len(areas) // 2
    expected = areas[middle] ** 0.5 if len(areas) % 2 else (areas[middle - 1] ** 0.5 + areas[middle] ** 0.5) / 2
    assert facts.object_side == pytest.approx(expected)


def test_objects_of_rows_are_measured_by_their_masks_whatever_the_area_in_their_file(tmp_path: Path) -> None:
    rows = load_coco(write(tmp_path / "set", content(annotation(area=0))), cache_dir=tmp_path / "cache")["train"]
    assert rows[0]["objects"][0]["area"] == 0
    assert facts_of(images_of_rows(rows)).object_side == pytest.approx(80**0.5)  # 10 x 8 pixels
