"""What a recipe names, made ready to train: data, augmentation, model, and what is saved beside it."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from m2f_trainer.config.arguments import DataArguments, ModelArguments
from m2f_trainer.config.recipe import Recipe, save_recipe
from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import Category
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.data.transforms import EvalTransform, TrainTransform
from m2f_trainer.data.validate import check_dataset
from m2f_trainer.errors import RecipeError
from m2f_trainer.evaluation.evaluator import Assessment
from m2f_trainer.model.build import build_model
from m2f_trainer.model.lora import LoraSettings, set_tuning
from m2f_trainer.model.mask2former import M2FConfig, M2FModel
from m2f_trainer.run_folder import RECIPE
from m2f_trainer.training.feature_cache import cached


class SavedWithModel:
    """What goes beside the weights in every saved folder: the recipe, and transformers' processor configuration."""

    def __init__(self, recipe: Recipe, config: M2FConfig) -> None:
        self.recipe, self.config = recipe, config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write recipe.json and preprocessor_config.json."""
        save_recipe(self.recipe, Path(folder, RECIPE))
        image_processor(self.config).save_pretrained(folder)


def require_figure(name: str | None, rows: Dataset) -> None:
    """Raise RecipeError where evaluations have no figure of that name, which the Trainer finds at the first one."""
    figures = [f"eval_{figure}" for figure in Assessment(rows.select([0]))([])]
    wanted = f"eval_{str(name).removeprefix('eval_')}"
    if name is not None and wanted not in figures:
        nearest = difflib.get_close_matches(wanted, figures, n=1, cutoff=0.0)[0]
        raise RecipeError(
            f"metric_for_best_model={name}: no such figure; the nearest is {nearest}. There are {', '.join(figures)}."
        )


def image_processor(config: M2FConfig) -> Mask2FormerImageProcessorPil:
    """transformers' processor, for its pipelines: it resizes to the exact frame, so that nothing is padded.

    transformers' post-processing does not undo padding; ours (`Predictor`) keeps the aspect ratio and does.
    """
    return Mask2FormerImageProcessorPil(
        size={"height": config.image_height, "width": config.image_width},
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        do_reduce_labels=False,
        ignore_index=255,
    )


def load_data(data: DataArguments) -> tuple[Dataset, DatasetDict]:
    """Load and check the training split and those to score on; train and valid must be there.

    Raises DataError before any model is touched.
    """
    splits = load_dataset(str(data.dataset_name))
    scored = [split for split in ("valid", "test") if split == "valid" or split in splits]
    check_dataset(splits, train="train", evaluation=scored)
    to_score = DatasetDict({split: first(splits[split], data.max_eval_samples) for split in scored})
    return first(splits["train"], data.max_train_samples), to_score


def training_samples(recipe: Recipe, rows: Dataset, categories: Sequence[Category], model: M2FModel) -> InstanceDataset:
    """The training split as the model is shown it, with what the backbone makes of it where that is to be kept."""
    samples, views = InstanceDataset(rows, train_transform(recipe), categories), recipe.model.feature_cache
    return samples if views is None else cached(samples, categories, model, views, recipe.train)


def first(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def build(model: ModelArguments, data: DataArguments, categories: Sequence[Category]) -> M2FModel:
    """The model of a recipe, its backbone frozen, adapted or free as the recipe says."""
    built = build_model(
        model.backbone_config or model.backbone,
        [vars(category) for category in categories],
        image_size=(data.image_height, data.image_width),
        taps=model.pyramid_taps or (),
        head_checkpoint=model.head_checkpoint,
        init_from=model.init_from,
        neck=model.neck,
        num_queries=model.num_queries,
        drop_path=model.drop_path,
        rope_rescale=model.rope_rescale,
        **(model.head_config if isinstance(model.head_config, dict) else {}),
    )
    lora = LoraSettings(model.lora_rank, model.lora_alpha, model.lora_dropout, mlp="mlp" in model.lora_targets)
    set_tuning(built, model.tune, lora)
    return built


def train_transform(recipe: Recipe) -> TrainTransform:
    """The augmentation of a recipe."""
    data, augment = recipe.data, recipe.data.augment()
    return TrainTransform(
        data.image_height,
        data.image_width,
        flip=augment.pop("horizontal_flip"),
        min_area=data.min_instance_area,
        seed=recipe.train.seed if recipe.train.data_seed is None else recipe.train.data_seed,
        **augment,
    )


def eval_transform(data: DataArguments) -> EvalTransform:
    """Resize and pad, nothing else."""
    return EvalTransform(data.image_height, data.image_width)
