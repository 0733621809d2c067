"""Model and data fields: presets of the augmentation, and fields that contradict each other."""

from typing import Any

import pytest

from m2f_trainer.config.arguments import AUGMENTATIONS, DataArguments, ModelArguments
from m2f_trainer.errors import RecipeError

FIELDS = ("lsj_min_scale", "lsj_max_scale", "horizontal_flip", "rotate90", "color_jitter", "copy_paste")
VALUES = {
    "none": (1.0, 1.0, False, False, 0.0, 0.0),
    "light": (0.8, 1.25, True, False, 0.2, 0.0),
    "lsj": (0.1, 2.0, True, False, 0.0, 0.0),
    "strong": (0.1, 2.0, True, True, 0.4, 0.5),
}


@pytest.mark.parametrize("preset", VALUES)
def test_a_preset_sets_the_six_fields(preset: Any) -> None:
    assert DataArguments(augmentation=preset).augment() == dict(zip(FIELDS, VALUES[preset], strict=True))
    assert set(VALUES) == set(AUGMENTATIONS)


def test_a_field_that_is_set_overrides_the_preset() -> None:
    augment = DataArguments(augmentation="strong", rotate90=False, copy_paste=0.0, horizontal_flip=False).augment()
    assert (augment["rotate90"], augment["copy_paste"], augment["horizontal_flip"]) == (False, 0.0, False)
    assert augment["color_jitter"] == 0.4


def test_the_preset_none_never_flips() -> None:
    assert not DataArguments(augmentation="none", horizontal_flip=True).augment()["horizontal_flip"]


def test_the_smallest_scale_is_compared_with_the_largest_of_the_preset() -> None:
    with pytest.raises(RecipeError, match=r"lsj_min_scale: expected at most lsj_max_scale=1\.25, got 1\.5"):
        DataArguments(augmentation="light", lsj_min_scale=1.5)
    assert DataArguments(augmentation="light", lsj_min_scale=1.5, lsj_max_scale=1.5).augment()["lsj_max_scale"] == 1.5


def test_a_feature_cache_needs_a_frozen_backbone() -> None:
    assert ModelArguments(feature_cache=2).tune == "frozen"
    assert ModelArguments(feature_cache=0, tune="full").tune == "full"
    with pytest.raises(RecipeError, match=r"feature_cache=2 .* tune=full changes .* Set tune to frozen"):
        ModelArguments(feature_cache=2, tune="full")


def test_only_one_source_initialises_the_head() -> None:
    with pytest.raises(RecipeError, match=r"both initialise the head\. Keep one of them"):
        ModelArguments(head_checkpoint="a", init_from="b")


@pytest.mark.parametrize("weights", ["inverse", {"cell": 0}, {"cell": "2"}, {"cell": True}, {"cell": [1]}], ids=str)
def test_class_weights_are_positive_numbers_or_balanced(weights: Any) -> None:
    assert ModelArguments(class_weights={"cell": 2, "dust": 0.5}).class_weights == {"cell": 2, "dust": 0.5}
    assert ModelArguments(class_weights="balanced").class_weights == "balanced"
    with pytest.raises(
        RecipeError, match='class_weights: expected "balanced", or an object of class names and numbers'
    ):
        ModelArguments(class_weights=weights)
