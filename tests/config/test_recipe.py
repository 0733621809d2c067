"""Recipes: JSON and options -> three dataclasses; every error says what to do."""

import json
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

from m2f_trainer.config.recipe import OptionParser, checked, find_recipe, hints, load_recipe, save_recipe
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import ModelFolderError, RecipeError
from tests.model.tiny import tiny_model


def write(folder: Path, values: dict[str, Any] | str) -> str:
    path = folder / "recipe.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return str(path)


def error_of(*argv: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(argv)
    return str(caught.value)


def test_json_alone_makes_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe([write(tmp_path, {"dataset_name": "coco", "tune": "lora", "max_steps": 7, "lora_rank": 8})])
    assert (recipe.data.dataset_name, recipe.model.tune, recipe.train.max_steps) == ("coco", "lora", 7)


def test_the_command_line_alone_makes_a_recipe() -> None:
    recipe = load_recipe(
        ["--dataset_name", "coco", "--learning_rate=3e-4", "--no_horizontal_flip", "--num-queries", "7"]
    )
    assert (recipe.train.learning_rate, recipe.data.horizontal_flip, recipe.model.num_queries) == (3e-4, False, 7)


def test_a_run_from_a_model_has_its_backbone_unless_another_is_given(tmp_path: Path) -> None:
    """The default backbone is gated, and can't hold the weights of another one."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "random")
    model.config.backbone_name = "dinov2-small"
    model.save_pretrained(tmp_path / "first")
    size = ["--dataset_name", "coco", "--image_height", "56", "--image_width", "56"]
    random = load_recipe([*size, "--init_from", str(tmp_path / "random")]).model.backbone_config
    again = tiny_model(random, init_from=str(tmp_path / "random"))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    first = ["--init_from", str(tmp_path / "first")]
    assert load_recipe([*size, *first]).model.backbone == "dinov2-small"
    chosen = load_recipe([*size, *first], lambda given: {"tune": "full"}).model
    assert (chosen.backbone, chosen.tune) == ("dinov2-small", "full")
    other = load_recipe([*size, *first, "--backbone", "dinov2-large"])
    assert other.model.backbone == "dinov2-large"
    of_file = [write(tmp_path, {"init_from": first[1], "backbone": "dinov2-base"}), *size]
    assert load_recipe(of_file).model.backbone == "dinov2-base"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("runs/frist", "there is no such file or folder"),
        ("empty", r"init_from: no model could be read from 'empty': .*config\.json"),
        ("me/missing", r"init_from: no model could be read from 'me/missing'"),
    ],
)
def test_a_start_that_is_none_is_refused_before_the_settings_follow_from_another_backbone(
    start: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("empty", "runs/first"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFolderError, match=message):
        load_recipe(["--dataset_name", "coco", "--init_from", start])


def test_options_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"dataset_name": "coco", "max_steps": 7, "seed": 1})
    recipe = load_recipe([path, "--max_steps", "9", "--head_config", '{"hidden_dim": 32}'])
    assert (recipe.train.max_steps, recipe.train.seed, recipe.model.head_config) == (9, 1, {"hidden_dim": 32})


def test_null_on_the_command_line_unsets_an_optional_value(tmp_path: Path) -> None:
    path = write(tmp_path, {"dataset_name": "coco", "backbone_config": {"model_type": "dinov3_vit", "patch_size": 8}})
    assert load_recipe([path, "--backbone_config", "null"]).model.backbone_config is None


def test_the_defaults_are_those_of_the_literature() -> None:
    train = load_recipe(["--dataset_name", "coco"]).train
    assert (train.learning_rate, train.weight_decay, train.max_grad_norm) == (1e-4, 0.05, 0.01)
    assert (train.lr_scheduler_type, train.lr_scheduler_kwargs) == ("polynomial", {"power": 0.9, "lr_end": 0.0})
    assert (train.metric_for_best_model, train.greater_is_better, train.load_best_model_at_end) == (
        "eval_map",
        True,
        True,
    )
    assert (train.remove_unused_columns, train.backbone_lr_multiplier) == (False, 0.1)


@pytest.mark.parametrize("options", [[], ["--checkpointing_steps", "50", "--max_steps", "100", "--report_to", "none"]])
def test_a_saved_recipe_loads_as_an_equal_one(tmp_path: Path, options: list[str]) -> None:
    recipe = load_recipe(["--dataset_name", "coco", *options])
    save_recipe(recipe, tmp_path / "saved.json")
    assert load_recipe([str(tmp_path / "saved.json")]) == recipe


def test_a_saved_recipe_has_no_token_and_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    save_recipe(load_recipe(["--dataset_name", "coco"]), tmp_path / "saved.json")
    text = (tmp_path / "saved.json").read_text()
    assert "hf_canary" not in text
    assert not {"hub_token", "local_rank"} & set(json.loads(text))


@pytest.mark.parametrize(
    ("values", "nearest"),
    [
        ({"bakcbone": "x"}, "the nearest is backbone."),
        ({"datasetname": "x"}, "the nearest is dataset_name."),
        ({"evaluation_strategy": "no"}, "the nearest is eval_strategy."),
        ({"checkpoint_steps": 3}, "the nearest is checkpointing_steps."),
        ({"model_name_or_path": "x"}, "use backbone"),
        ({"do_reduce_labels": True}, "leave it out"),
        ({"warmup_ratio": 0.1}, "use warmup_steps"),
        ({"streaming": True}, "it was removed in this version; leave it out: Hub datasets are downloaded, or use max_"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(tmp_path: Path, values: dict[str, Any], nearest: str) -> None:
    message = error_of(write(tmp_path, values))
    assert f"Unknown option {next(iter(values))} in {tmp_path}" in message
    assert nearest in message


def test_a_saved_recipe_that_did_not_stream_still_loads(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"dataset_name": "coco", "streaming": false}')
    assert load_recipe([str(tmp_path / "recipe.json")]) == load_recipe(["--dataset_name", "coco"])


def test_an_unknown_option_names_the_nearest_valid_one() -> None:
    assert "Unknown option --image_hight on the command line: the nearest is --image_height." in error_of(
        "--image_hight", "3"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_steps": "many"}, "max_steps in .*: expected a whole number, got 'many'"),
        ({"max_steps": 1.5}, "expected a whole number, got 1.5"),
        ({"max_steps": True}, "expected a whole number, got True"),
        ({"learning_rate": "1e-4"}, "expected a number or \"auto\", got '1e-4'"),
        ({"learning_rate": None}, 'expected a number or "auto", got None'),
        ({"horizontal_flip": "yes"}, "expected true or false, got 'yes'"),
        ({"backbone": 3}, "expected a string, got 3"),
        ({"neck": "fpn"}, 'expected "pyramid" or "adapter" or "top_down" or "plain" or null, got \'fpn\''),
        ({"pyramid_taps": [1, "2"]}, "expected a list of whole numbers or null"),
        ({"backbone_config": [1]}, "expected an object or a string or null"),
        ({"early_stopping_patience": "3"}, "expected a whole number or null, got '3'"),
        ({"checkpointing_steps": 1.5}, "expected a string, got 1.5"),
    ],
)
def test_a_wrong_type_in_json_is_refused(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe([write(tmp_path, values)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max_steps", "many"], "--max_steps.*invalid int value: 'many'"),
        (["--learning_rate", "nan"], "learning_rate on the command line: expected a finite number, got nan"),
        (["--neck", "fpn"], r"--neck: invalid choice: 'fpn' \(choose from .*'?null'?\)"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["--image-width", "32", "--image_width=32"], "--image_width is given twice"),
        (["--seed", "1", "stray"], "Expected --option value, got 'stray'"),
        (["--backbone_config", '{"a": 1, "a": 2}'], "The key 'a' occurs 2 times"),
        (["--head_config", "nonsense"], "head_config on .*: expected a JSON object, .* or null, got 'nonsense'"),
        (["--lr_scheduler_kwargs", "power=1"], "lr_scheduler_kwargs on .*: expected a JSON object"),
    ],
)
def test_a_wrong_command_line_is_refused(options: list[str], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(options)


def test_every_field_that_may_be_null_takes_null_as_an_option(tmp_path: Path) -> None:
    saved = write(tmp_path, {"dataset_name": "coco", "neck": "plain", "lr_milestones": [0.5], "annotations": ["a=b"]})
    recipe = load_recipe([saved, "--neck", "null", "--lr_milestones", "null", "--annotations", "null"])
    assert (recipe.model.neck, recipe.train.lr_milestones, recipe.data.annotations) == (None, None, None)
    nullable = [name for name, hint in hints().items() if NoneType in get_args(hint)]
    options = [word for name in nullable for word in (f"--{name}", "null")]
    assert checked(OptionParser().given(options), "on the command line") == dict.fromkeys(nullable)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"seed": 1, "max_steps": 2, "seed": 3}', "The key 'seed' occurs 2 times in .*recipe.json. Keep one"),
        ('{"head_config": {"hidden_dim": 1, "hidden_dim": 2}}', "The key 'hidden_dim' occurs 2 times"),
        ('{"learning_rate": NaN}', "Found NaN in .*expected a finite number"),
        ('{"learning_rate": -Infinity}', "Found -Infinity in"),
        ('{"learning_rate": 1e999}', "expected a finite number, got inf"),
        ('{"seed": 1', "Broken JSON in .*recipe.json"),
        ("[" * 100_000, "Broken JSON in|expected one JSON object"),
        ("[1]", "expected one JSON object of options, got a list"),
        ('{"seed": 1' + "0" * 5000 + "}", "Broken JSON in .*digits"),
        ("", "Broken JSON"),
    ],
)
def test_broken_json_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe([write(tmp_path, text)])


def test_a_missing_recipe_names_the_shipped_ones() -> None:
    message = error_of("no_such_recipe.json")
    assert "No recipe 'no_such_recipe.json'" in message
    assert "dinov3_vits16plus_1024, " in message


def test_a_shipped_recipe_is_found_by_its_name() -> None:
    assert find_recipe("quickstart").name == find_recipe("quickstart.json").name == "quickstart.json"


def test_a_missing_dataset_is_named() -> None:
    assert "dataset_name is missing" in error_of("--max_steps", "3")


@pytest.mark.parametrize(("value", "strategy", "steps"), [(300, "steps", 300), ("epoch", "epoch", None)])
def test_checkpointing_steps_sets_saving_and_evaluation_together(
    tmp_path: Path, value: int | str, strategy: str, steps: int | None
) -> None:
    train = load_recipe([write(tmp_path, {"dataset_name": "coco", "checkpointing_steps": value})]).train
    assert (train.save_strategy, train.eval_strategy) == (strategy, strategy)
    assert (train.save_steps, train.eval_steps) == (steps, steps)


@pytest.mark.parametrize(
    "values",
    [
        {"checkpointing_steps": 300, "save_steps": 100},
        {"checkpointing_steps": 300, "eval_steps": 100},
        {"checkpointing_steps": 300, "eval_strategy": "epoch"},
        {"checkpointing_steps": "epoch", "save_strategy": "no"},
        {"save_steps": 500},
    ],
)
def test_fields_that_contradict_checkpointing_steps_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    message = error_of(write(tmp_path, {"dataset_name": "coco", **values}))
    assert "contradicts checkpointing_steps=" in message
    assert "or set checkpointing_steps" in message


def test_fields_that_agree_with_checkpointing_steps_are_accepted(tmp_path: Path) -> None:
    values = {"dataset_name": "coco", "checkpointing_steps": 300, "save_steps": 300, "eval_strategy": "steps"}
    assert load_recipe([write(tmp_path, values)]).train.eval_steps == 300


def test_a_tile_fills_a_square_frame_which_by_default_is_of_its_own_size() -> None:
    def frame(*options: str) -> tuple[int, int]:
        data = load_recipe(["--dataset_name", "x", "--backbone", "dinov2-small", *options]).data
        return data.image_height, data.image_width

    assert frame("--tile_size", "112") == (112, 112)
    assert frame("--tile_size", "113") == (126, 126), "a multiple of the patch size"
    assert frame("--tile_size", "112", "--image_height", "224", "--image_width", "224") == (224, 224)
    with pytest.raises(RecipeError, match=r"tile_size=112: tiles are square, .* 224 x 1022\. Give .* one value"):
        frame("--tile_size", "112", "--image_height", "224", "--image_width", "1022")


def test_tiles_of_evaluation_need_tiles_of_training() -> None:
    with pytest.raises(RecipeError, match=r"eval_tile_size=64 needs tile_size: .* Give tile_size too, or leave"):
        load_recipe(["--dataset_name", "x", "--eval_tile_size", "64"])


def test_tiles_keep_the_scale_of_the_images_unless_a_size_is_given() -> None:
    def scales(*options: str) -> tuple[float, float]:
        augment = load_recipe(["--dataset_name", "x", "--tile_size", "128", *options]).data.augment()
        return augment["lsj_min_scale"], augment["lsj_max_scale"]

    assert scales() == scales("--augmentation", "strong") == (1.0, 1.0)
    assert scales("--augmentation", "light") == (0.8, 1.25)
    assert scales("--lsj_min_scale", "0.5") == (0.5, 1.0)


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "epochs", ""])
def test_other_checkpointing_steps_are_refused(value: str) -> None:
    assert f'or "epoch", got {value!r}' in error_of("--dataset_name", "coco", f"--checkpointing_steps={value}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--backbone", "dinov3-vits16plus", "--image_height", "1000"], "image_height=1000 .* 16. .* 992 or 1008."),
        (["--backbone", "dinov2-small", "--image_width", "1024"], "nearest are 1022 or 1036."),
        (["--backbone", "dinov3-convnext-tiny", "--image_width", "20"], "nearest are 32."),
        (["--backbone_config", '{"model_type": "dinov3_vit", "patch_size": 10}'], "1024 .* 1020 or 1030."),
    ],
)
def test_sides_that_are_no_multiple_of_the_patch_size_name_the_nearest(options: list[str], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(["--dataset_name", "coco", *options])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num_queries", "0"], "num_queries: expected between 1 and 10000, got 0"),
        (["--lora_dropout", "1.5"], "lora_dropout: expected between 0 and 1, got 1.5"),
        (["--lsj_min_scale", "3"], "lsj_min_scale: expected at most lsj_max_scale=2.0, got 3"),
        (["--early_stopping_patience", "0"], "early_stopping_patience: expected at least 1"),
        (["--head_checkpoint", "a", "--init_from", "b"], "Keep one of them"),
        (["--lr_scheduler_type", "cosin"], "cosin is not a valid SchedulerType"),
        (["--remove_unused_columns", "true"], "remove_unused_columns must stay false"),
        (["--train_sampling_strategy", "group_by_length"], "=group_by_length: expected random or sequential"),
        (["--use_liger_kernel", "true"], "use_liger_kernel has kernels for language models only"),
        (["--neftune_noise_alpha", "5"], "neftune_noise_alpha adds noise to the embeddings of words"),
        (["--learning_rate", "0"], "polynomial with .* must be smaller than initial lr"),
        (["--learning_rate=-0.1"], "learning_rate: expected at least 0, got -0.1"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size: expected at least 1, got 0"),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size: expected at least 1, got 0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: expected at least 1, got 0"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers: expected at least 0, got -1"),
        (["--seed", "-1"], "seed: expected between 0 and 4294967295, got -1"),
        (["--max_steps", "0"], "expected a run of at least one step"),
        (["--num_train_epochs", "0"], "expected a run of at least one step"),
        (["--max_steps=-5"], "max_steps=-5, .* expected a run of at least one step"),
        (["--num_train_epochs=-2"], "num_train_epochs=-2.0: expected a run of at least one step"),
        (["--bf16_full_eval", "true"], "bf16_full_eval would convert the trained weights to bfloat16.*: leave it out"),
        (["--fp16_full_eval", "true"], "fp16_full_eval would convert the trained weights to float16"),
        (["--average_tokens_across_devices", "false"], "average_tokens_across_devices must stay true"),
        (["--auto_find_batch_size", "true"], "auto_find_batch_size .* use per_device_train_batch_size auto"),
        (["--enable_jit_checkpoint", "true"], "enable_jit_checkpoint would replace the checkpoint .* SIGTERM"),
        (["--eval_delay", "3"], "eval_delay contradicts that every checkpoint is evaluated"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor has no effect on the losses"),
        (["--ignore_data_skip", "true"], "ignore_data_skip would train a resumed run on samples that it has seen"),
        (["--debug", "underflow_overflow"], "debug would stop the run at its own checks"),
        (["--accelerator_config", '{"split_batches": true}'], "split_batches in accelerator_config would divide"),
        (["--accelerator_config", '{"dispatch_batches": true}'], "dispatch_batches in accelerator_config can't cut"),
        (["--accelerator_config", '{"use_seedable_sampler": false}'], "use_seedable_sampler in .* must stay true"),
        (["--metric_for_best_model", "null"], "metric_for_best_model=null: expected a metric for load_best_model_at_e"),
        (
            ["--metric_for_best_model", "null", "--load_best_model_at_end", "false", "--early_stopping_patience", "2"],
            "metric_for_best_model=null: expected a metric for early_stopping_patience",
        ),
        (
            ["--lr_scheduler_type", "reduce_lr_on_plateau", "--head_first_steps", "0.1", "--lr_milestones", "0.5"],
            "reduce_lr_on_plateau follows .* head_first_steps and lr_milestones would have no effect",
        ),
        (["--lr_scheduler_type", "greedy", "--warmup_steps", "9"], "greedy follows .* warmup_steps would have no"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "cosine_with_min_lr with .* One of min_lr or min_lr_rate"),
        (["--lr_scheduler_kwargs", '{"powr": 1}'], "polynomial with .*'powr'"),
        (["--lr_scheduler_kwargs", '{"num_decay_steps": "a"}'], "num_decay_steps='a': expected a number of steps"),
        (["--lr_scheduler_kwargs", '{"num_decay_steps": -0.2}'], "num_decay_steps=-0.2: expected a number of steps"),
    ],
)
def test_values_out_of_range_are_refused(options: list[str], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(["--dataset_name", "coco", *options])


def test_a_saved_recipe_takes_another_schedule(tmp_path: Path) -> None:
    save_recipe(load_recipe(["--dataset_name", "coco"]), tmp_path / "saved.json")
    train = load_recipe([str(tmp_path / "saved.json"), "--lr_scheduler_type", "cosine"]).train
    assert (train.lr_scheduler_type, train.lr_scheduler_kwargs) == ("cosine", None)
    train = load_recipe([str(tmp_path / "saved.json"), "--lr_scheduler_type", "warmup_stable_decay"]).train
    assert train.lr_scheduler_kwargs == {"num_decay_steps": 0.2, "decay_type": "1-sqrt"}


def test_milestones_of_a_saved_step_schedule_do_not_stay_with_another(tmp_path: Path) -> None:
    for own in ([], ["--lr_milestones", "0.5"]):
        save_recipe(load_recipe(["--dataset_name", "coco", "--lr_scheduler_type", "step", *own]), tmp_path / "a.json")
        again = load_recipe([str(tmp_path / "a.json")]).train
        assert again.lr_milestones == ([0.5] if own else [0.889, 0.963])
        train = load_recipe([str(tmp_path / "a.json"), "--lr_scheduler_type", "cosine"]).train
        assert train.lr_milestones == ([0.5] if own else None)


def test_the_object_of_a_field_may_be_indented() -> None:
    recipe = load_recipe(["--dataset_name", "coco", "--head_config", ' {"hidden_dim": 48}'])
    assert recipe.model.head_config == {"hidden_dim": 48}


def test_layer_decay_on_a_saved_recipe_has_its_own_default_multiplier(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved.json")
    for own, multiplier in (([], 1.0), (["--backbone_lr_multiplier", "0.3"], 0.3)):
        save_recipe(load_recipe(["--dataset_name", "coco", *own]), Path(saved))
        assert load_recipe([saved]).train.backbone_lr_multiplier == (0.3 if own else 0.1)
        assert load_recipe([saved, "--layer_decay", "0.8"]).train.backbone_lr_multiplier == multiplier
    save_recipe(load_recipe(["--dataset_name", "coco", "--layer_decay", "0.8"]), Path(saved))
    assert load_recipe([saved, "--layer_decay", "null"]).train.backbone_lr_multiplier == 0.1


def test_a_length_on_the_command_line_replaces_the_other_kinds_in_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, {"dataset_name": "coco", "max_steps": 50, "num_train_epochs": 2})
    minutes, epochs, same = (
        load_recipe([path, *option]).train
        for option in (["--max_minutes", "3"], ["--num_train_epochs", "9"], ["--max_steps", "-1"])
    )
    assert (minutes.max_minutes, minutes.for_trainer().max_steps) == (3, 10**9)
    assert (epochs.num_train_epochs, epochs.max_steps) == (9, -1)
    assert (same.num_train_epochs, same.max_steps) == (2, -1)
    with pytest.raises(RecipeError, match="both set the length"):
        load_recipe([path, "--max_minutes", "3", "--max_steps", "5"])


def test_a_token_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for message in (error_of("--hub_token", "hf_canary"), error_of(write(tmp_path, {"hub_token": "hf_canary"}))):
        assert "HF_TOKEN" in message
        assert "hf auth login" in message
        assert "canary" not in message
    with pytest.raises(RecipeError, match="HF_TOKEN"):
        TrainArguments(hub_token="hf_canary")


@pytest.mark.parametrize("values", [{"init_from": "evil.py"}, {"head_config": {"activation_function": ["a/b.py"]}}])
def test_a_recipe_names_no_python_file(tmp_path: Path, values: dict[str, Any]) -> None:
    assert "a recipe holds values, never code" in error_of(write(tmp_path, values))


@pytest.mark.parametrize(
    ("value", "resume"),
    [(True, True), ("true", True), (False, False), (None, False), ("runs/a/checkpoint-3", "runs/a/checkpoint-3")],
)
def test_resume_from_checkpoint_takes_true_or_a_folder(tmp_path: Path, value: Any, resume: bool | str) -> None:
    path = write(tmp_path, {"dataset_name": "coco", "resume_from_checkpoint": value})
    assert load_recipe([path]).train.resume == resume


def test_the_trainers_own_upload_is_off() -> None:
    train = load_recipe(["--dataset_name", "coco", "--push_to_hub", "--hub_model_id", "me/pets"]).train
    assert train.push_to_hub
    assert not train.for_trainer().push_to_hub
    assert train.for_trainer().hub_model_id == "me/pets"


def test_a_run_is_named_by_its_folder_for_loggers_but_not_in_its_recipe() -> None:
    train = load_recipe(["--dataset_name", "coco", "--output_dir", "runs/first"]).train
    assert train.for_trainer().run_name == "first"
    assert train.run_name is None
    train.run_name = "mine"
    assert train.for_trainer().run_name == "mine"


@pytest.mark.parametrize("total", [1, 2, 30])
def test_the_polynomial_schedule_warms_up_and_ends_at_zero_however_short_the_run(total: int) -> None:
    train = TrainArguments()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    warmup = train.get_warmup_steps(total)
    schedule = get_scheduler("polynomial", optimizer, warmup, total, train.lr_scheduler_kwargs)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(total):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert max(rates) == rates[warmup] == train.learning_rate
    assert rates[-1] == 0.0
    halfway = (total + warmup) // 2
    assert rates[halfway] == pytest.approx(1e-4 * (1 - (halfway - warmup) / (total - warmup)) ** 0.9)


def test_whole_numbers_in_json_are_floats_where_a_field_is_one(tmp_path: Path) -> None:
    values = {
        "dataset_name": "coco", "discrimination_weight": 0, "quality_weight": 2, "tile_overlap": 0, "rope_rescale": 2,
        "num_queries": 7, "ema_decay": None,
    }  # fmt: skip
    recipe = load_recipe([write(tmp_path, values)])
    found = {**vars(recipe.model), **vars(recipe.data), **vars(recipe.train)}
    for name, value in values.items():
        assert found[name] == value
        assert isinstance(found[name], int) == (name == "num_queries")


def test_a_vits_image_side_of_one_patch_is_refused_unless_the_neck_is_plain(tmp_path: Path) -> None:
    vit = {"dataset_name": "coco", "backbone_config": {"model_type": "dinov2", "patch_size": 14}, "image_width": 28}
    path = write(tmp_path, {**vit, "image_height": 14})
    message = error_of(path)
    assert message.startswith("image_height=14: expected at least 28, two patches of the backbone")
    assert load_recipe([path, "--neck", "plain"]).data.image_height == 14
    assert error_of(path, "--image_height", "15").endswith("The nearest are 28.")
    del vit["image_width"]
    tiles = load_recipe([write(tmp_path, {**vit, "tile_size": 8})])
    assert (tiles.data.image_height, tiles.data.image_width) == (28, 28)
