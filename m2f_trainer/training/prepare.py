"""The parts of a run, built from recipe values: data, samples, model, and the files saved with the model."""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from m2f_trainer.config.arguments import (
    HEADS,
    DataArguments,
    ModelArguments,
    PixelRange,
    parse_pixel_range,
    pixel_range_text,
)
from m2f_trainer.config.recipe import Recipe, save_recipe
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.collate import EvalImages, InstanceDataset, object_counts
from m2f_trainer.data.dataset import Category, categories_of
from m2f_trainer.data.hub_dataset import load_recipe_dataset
from m2f_trainer.data.imbalance import RepeatedSamples, resolve_weights, weights_of_classes, weights_text
from m2f_trainer.data.reading import reading_of
from m2f_trainer.data.tiles import EvalTiles, TileTransform, TrainTiles, tiling_of
from m2f_trainer.data.transforms import EvalTransform, TrainTransform
from m2f_trainer.data.validate import check_dataset, has_targets
from m2f_trainer.distributed import warn_on_main
from m2f_trainer.errors import DataError, ModelFolderError, RecipeError, check_model_path, mistyped_path
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.model.build import build_model, load_base_weights, resume_model
from m2f_trainer.model.lora import LoraSettings, set_tuning
from m2f_trainer.model.mask2former import M2FConfig, M2FModel
from m2f_trainer.model.sources import ModelError
from m2f_trainer.run_folder import RECIPE
from m2f_trainer.training.feature_cache import with_cached_maps

logger = logging.getLogger(__name__)
NAMED = 5
"""Maximum number of samples that a message names."""
CHANGEABLE = {
    "tile_size", "tile_overlap", "pixel_range", "class_weights", "discrimination_weight", "matrix_nms",
}  # fmt: skip
"""Fields of `M2FConfig`, besides the image size, of the recipe of a resumed run; no weight depends on them."""


@dataclass(frozen=True)
class Data:
    """The checked rows of a run by split, the categories of the training split, of which class k is the k-th, and the
    range of the values of its images.
    """

    train: Dataset
    valid: Dataset
    test: Dataset | None
    categories: tuple[Category, ...]
    pixel_range: PixelRange


def check_sources(model: ModelArguments) -> None:
    """Raise ModelFolderError for a mistyped path of a model that a new run starts from."""
    for source in (model.init_from, model.head_checkpoint):
        if source is not None:
            check_model_path(source)


def load_data(data: DataArguments) -> Data:
    """Load and check the dataset of a recipe; it must have the splits train and valid.

    Raises DataError before any model is built.
    """
    splits = load_recipe_dataset(vars(data))
    scored = [split for split in ("valid", "test") if split == "valid" or split in splits]
    check_dataset(splits, train="train", evaluation=scored)
    train = first_rows(splits["train"], data.max_train_samples)
    test = first_rows(splits["test"], data.max_eval_samples) if "test" in splits else None
    valid = first_rows(splits["valid"], data.max_eval_samples)
    if not has_targets(valid):
        raise DataError(
            "split 'valid': expected objects to evaluate on, found only crowd regions or none in its first "
            f"{len(valid):,} image(s). Raise max_eval_samples."
        )
    pixel_range = reading_of(train[0]).pixel_range
    if data.pixel_range == "auto" and pixel_range is not None:
        warn_on_main(logger, "auto: pixel_range = %s, found in the training images", pixel_range_text(pixel_range))
    return Data(train, valid, test, categories_of(train), pixel_range)


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def train_samples(rows: Dataset, data: DataArguments, seed: int, categories: Sequence[Category]) -> InstanceDataset:
    """Training rows, or tiles of them, with the recipe's augmentation, a function of (seed, epoch, index).

    Samples with rare classes are repeated if the recipe has a `repeat_factor_threshold`.

    Raises:
        DataError: there are no objects in them
    """
    transform = train_transform(data, seed)
    samples = InstanceDataset(rows, transform, categories)
    if isinstance(transform, TileTransform):
        samples = TrainTiles(rows, transform, categories, data.empty_tiles, data.tiles_per_image)
        sizes = f"{transform.side} x {transform.side} pixels, resized to {data.image_height} x {data.image_width}"
        warn_on_main(logger, "tiles: %s per epoch, from %s images; %s", f"{len(samples):,}", f"{len(rows):,}", sizes)
    if not samples.objects().any():
        raise DataError(
            "split 'train': expected objects to train on, found only crowd regions or none in its first "
            f"{len(rows):,} image(s). Raise max_train_samples, or annotate objects in them."
        )
    if data.repeat_factor_threshold:
        samples = RepeatedSamples(samples, data.repeat_factor_threshold, seed)
        warn_on_main(logger, "%s", samples.summary())
    return samples


def require_batch(samples: InstanceDataset, train: TrainArguments) -> None:
    """Raise RecipeError if `dataloader_drop_last` would leave out all samples: fewer than one batch of all processes.

    The Trainer would make no step, and the run would end with an untrained model.
    """
    images, processes = int(train.per_device_train_batch_size), train.world_size
    if train.dataloader_drop_last and len(samples) < images * processes:
        each = f" on each of {processes} processes" if processes > 1 else ""
        raise RecipeError(
            f"dataloader_drop_last: expected at least one whole batch of {images * processes:,} training samples, got "
            f"{len(samples):,} samples, so that no step would be made. Lower per_device_train_batch_size (now "
            f"{images}{each}), or set dataloader_drop_last false."
        )


def with_class_weights(recipe: Recipe, samples: InstanceDataset) -> Recipe:
    """The recipe with `class_weights` resolved to a weight for each class name, if it has any.

    Raises:
        RecipeError: it names a class that the training split does not have
    """
    if recipe.model.class_weights is None:
        return recipe
    weights = resolve_weights(recipe.model.class_weights, samples)
    warn_on_main(logger, "%s", weights_text(weights, samples))
    return replace(recipe, model=replace(recipe.model, class_weights=weights))


def report_overfull(samples: InstanceDataset, num_queries: int) -> None:
    """Log the training samples with more objects than queries: a step learns at most `num_queries` objects of each."""
    over = np.flatnonzero(samples.objects() > num_queries)
    if len(over):
        named = ", ".join(samples.name(int(index)) for index in over[:NAMED]) + (", ..." if len(over) > NAMED else "")
        warn_on_main(
            logger,
            "%s of %s training samples hold more objects than the %s queries, so that some of their objects are not "
            "learnt: %s. Raise num_queries, or use tiles (tile_size).",
            f"{len(over):,}", f"{len(samples):,}", num_queries, named,
        )  # fmt: skip


def eval_samples(rows: Dataset, config: M2FConfig, categories: Sequence[Category]) -> InstanceDataset:
    """Rows to score on: whole images, resized and padded, or tiles of them."""
    tiling = tiling_of(config)
    if tiling is not None:
        return EvalTiles(rows, tiling, categories)
    return EvalImages(rows, EvalTransform(config.image_height, config.image_width), categories)


def with_feature_cache(
    samples: InstanceDataset, model: M2FModel, views: int | None, args: TrainArguments
) -> InstanceDataset:
    """The samples with precomputed features of a frozen backbone for `views` views of each; unchanged for None or 0."""
    return with_cached_maps(samples, model, views, args) if views else samples


def train_transform(data: DataArguments, seed: int) -> TrainTransform:
    """The augmentation of a recipe."""
    augment = data.augment()
    settings = {"flip": augment.pop("horizontal_flip"), "min_area": data.min_instance_area, "seed": seed, **augment}
    if data.tile_size:
        return TileTransform(data.image_height, data.image_width, data.tile_size, **settings)
    return TrainTransform(data.image_height, data.image_width, **settings)


def augmentation_seed(train: TrainArguments) -> int:
    """`data_seed` if it is set, else `seed`."""
    return train.seed if train.data_seed is None else train.data_seed


def build_recipe_model(
    model: ModelArguments, data: DataArguments, categories: Sequence[Category], checkpoint: Path | None = None
) -> M2FModel:
    """The model of a recipe, with its backbone frozen, with LoRA layers or fully trainable according to `tune`.

    That of a resumed run comes from its `checkpoint`; only `CHANGEABLE` fields follow the recipe.
    """
    pixel_range = parse_pixel_range(data.pixel_range)
    fields = {
        "tile_size": data.eval_tile_size or data.tile_size,
        "tile_overlap": data.tile_overlap,
        "pixel_range": None if pixel_range == "auto" else pixel_range,
        "class_weights": weights_of_classes(model.class_weights, categories),
        **head_settings(model),
    }
    if checkpoint is not None:
        sides = {"image_height": data.image_height, "image_width": data.image_width}
        kept = {name: value for name, value in fields.items() if name in CHANGEABLE}
        built = resume_model(str(checkpoint), has_weights=model.tune != "lora", **sides, **kept)
        if model.tune == "lora":
            load_lora_base(built, model, checkpoint)
    else:
        built = build_model(
            model.backbone_config or model.backbone,
            [vars(category) for category in categories],
            image_size=(data.image_height, data.image_width),
            taps=model.pyramid_taps or (),
            head_checkpoint=model.head_checkpoint,
            init_from=model.init_from,
            num_queries=model.num_queries,
            drop_path=model.drop_path,
            rope_rescale=model.rope_rescale,
            **fields,
        )
    lora = LoraSettings(model.lora_rank, model.lora_alpha, model.lora_dropout, mlp="mlp" in model.lora_targets)
    set_tuning(built, model.tune, lora)
    built.model.pixel_level_module.decoder.recompute_feed_forward = model.recompute_feed_forward
    return built


def load_lora_base(built: M2FModel, model: ModelArguments, checkpoint: Path) -> None:
    """Fill the backbone of a resumed run with the weights that its LoRA matrices are added to.

    A checkpoint holds them only with the matrices merged in, so they are read from where the run began: from the folder
    that the recipe names, or where it was then. Raises ModelFolderError where they are no longer there.
    """
    init_from, recorded = model.init_from, built.config.init_from if model.init_from else built.config.backbone_name
    named = None if model.backbone_config or not Path(model.backbone).exists() else model.backbone
    source = init_from or named or built.config.backbone_name
    try:
        if init_from or Path(source).is_absolute():
            problem = mistyped_path(source)
            if problem:
                raise ModelFolderError(problem)
        load_base_weights(built, init_from, named)
    except (ModelError, ModelFolderError) as error:
        option = "init_from" if init_from else "backbone"
        then = f" ({recorded} when the run began)" if recorded and recorded != source else ""
        remedy = ", or give its new place with --init_from" if init_from else ""
        raise ModelFolderError(
            f"{checkpoint} can't be resumed without {option} {source}{then}. With tune lora, a checkpoint holds the "
            "weights of the backbone with the LoRA matrices merged in; the weights that the matrices are added to are "
            f"read from there. Put it back{remedy}. It could not be read: {error}"
        ) from error


def head_settings(model: ModelArguments) -> dict[str, Any]:
    """Fields of `M2FConfig`: the preset's, changed by head_config.

    The head of a checkpoint keeps its own shape: recipes of older versions name the original head beside it.
    """
    given = model.head_config if isinstance(model.head_config, dict) else {}
    weights = {"discrimination_weight": model.discrimination_weight, "quality_weight": model.quality_weight}
    preset = {} if model.head is None or model.head_checkpoint else HEADS[model.head]
    neck = {"neck": model.neck} if model.neck else {}
    return {**weights, "matrix_nms": model.matrix_nms, **preset, **neck, **given}


def require_figure(name: str | None, rows: Dataset) -> None:
    """Raise RecipeError if evaluations have no metric of that name; the Trainer notices it at the first evaluation
    only.
    """
    densest = int(np.argmax(object_counts(rows)))  # dense images have more metrics
    figures = [f"eval_{figure}" for figure in Evaluator(rows.select([densest]))([])]
    wanted = f"eval_{str(name).removeprefix('eval_')}"
    if name is not None and wanted not in figures:
        nearest = difflib.get_close_matches(wanted, figures, n=1, cutoff=0.0)[0]
        raise RecipeError(
            f"metric_for_best_model={name}: unknown metric; the nearest is {nearest}. Known: {', '.join(figures)}."
        )


class SavedWithModel:
    """Files saved with the weights in every folder: the recipe, and the configuration of transformers' processor.

    It is passed to the Trainer as `processing_class`, whose `save_pretrained` is called at every save.
    """

    def __init__(self, recipe: Recipe, config: M2FConfig) -> None:
        self.recipe, self.config = recipe, config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write recipe.json and preprocessor_config.json."""
        save_recipe(self.recipe, Path(folder, RECIPE))
        image_processor(self.config).save_pretrained(folder)


def image_processor(config: M2FConfig) -> Mask2FormerImageProcessorPil:
    """transformers' processor, for its pipelines. It resizes images to the model's exact size, without padding.

    transformers' post-processing does not undo padding. Ours (`Predictor`) does, and keeps the aspect ratio.
    """
    return Mask2FormerImageProcessorPil(
        size={"height": config.image_height, "width": config.image_width},
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        size_divisor=1,  # by default it rounds sides up to multiples of 32
        do_reduce_labels=False,
        ignore_index=255,
    )
