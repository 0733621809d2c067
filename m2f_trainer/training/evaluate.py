"""Score a saved model on a split of a dataset: `m2f evaluate`."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from m2f_trainer.config.arguments import ExifFrame, parse_pixel_range
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.dataset import Category, lacks_validation
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.data.reading import model_range
from m2f_trainer.data.validate import check_split, match_rows, matched_ids
from m2f_trainer.distributed import warn_on_main
from m2f_trainer.errors import RecipeError, check_model_path
from m2f_trainer.evaluation.coco import LIMITS
from m2f_trainer.evaluation.gallery import draw_pictures
from m2f_trainer.evaluation.plots import write_plots
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Precision, uses_bf16
from m2f_trainer.model.mask2former import load_model
from m2f_trainer.run_folder import (
    CLASSES,
    EVALUATION,
    FINGERPRINT,
    METRICS,
    PREDICTIONS,
    RECIPE,
    STATE,
    blame_damage,
    read_json,
    write_atomically,
    write_classes,
    write_details,
    write_metrics,
)
from m2f_trainer.training.callbacks.progress import CPU, print_line
from m2f_trainer.training.checkpointing.fingerprint import annotations_digest
from m2f_trainer.training.prepare import eval_samples, first_rows
from m2f_trainer.training.trainer import M2FTrainer

logger = logging.getLogger(__name__)
BATCH = 4
"""Images or tiles of a forward pass where the model's training doesn't tell."""
WORTH_WORKERS = 64  # images; with fewer, starting and ending worker processes takes longer than reading


def evaluate_folder(
    model: str,
    dataset: str,
    split: str | None = None,
    output_dir: Path | None = None,
    batch_size: int | None = None,
    annotations: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    exif_frame: ExifFrame = "auto",
    pixel_range: str | None = None,
    precision: Precision = "auto",
    follow_links: bool = False,
) -> dict[str, float]:
    """Score a saved model on a split with the code that scores it during training, and optionally write the results.

    Prints the number of images and their split, which by default is that of `splits_to_score`.

    `output_dir` gets metrics.json, evaluation.json (read by reports), classes.csv, charts as PNG, pictures/ (the worst
    and the best images) and predictions.json (COCO results form with the dataset's category ids; the 100 best of each
    image, which the metrics count). The other files have the model's ids. `annotations`, `images`, `exif_frame` and
    `follow_links` are as of `load_dataset`; `pixel_range` is the recipe field, by default the model's own. `precision`
    is as of `Predictor`. Where the model's recipe.json is beside it and it was trained on such a device, "auto" is the
    precision of the training, and `batch_size`, the number of images or tiles of a forward pass, is by default that of
    its evaluations; otherwise 4.

    Raises:
        DataError: an unknown split, or categories of other names
        RecipeError: `output_dir` is a run's folder, whose own figures would be replaced
    """
    if output_dir is not None and Path(output_dir, RECIPE).is_file():
        raise RecipeError(f"{output_dir} holds a run, whose own figures would be replaced. Give another output_dir.")
    check_model_path(model)
    loaded = load_model(model)
    chosen = model_range(loaded.config.pixel_range) or "auto" if pixel_range is None else parse_pixel_range(pixel_range)
    load = partial(
        load_dataset,
        dataset,
        annotations,
        images,
        exif_frame=exif_frame,
        pixel_range=chosen,
        follow_links=follow_links,
    )
    split, splits = splits_to_score(load, model, dataset) if split is None else (split, load(required=split))
    check_split(splits, split)
    categories = [Category(**c) for c in loaded.config.categories or []]
    rows = match_rows(categories, splits[split])
    samples = eval_samples(rows, loaded.config, categories)
    arguments = TrainArguments(
        output_dir=str(output_dir or "."),
        per_device_eval_batch_size=batch_size or recipe_of_device(model).get("per_device_eval_batch_size", BATCH),
        report_to="none",
        bf16=evaluates_in_bf16(model, precision),
    )
    if len(samples) < WORTH_WORKERS:
        arguments.dataloader_num_workers, arguments.dataloader_persistent_workers = 0, False
    trainer = M2FTrainer(loaded, arguments, eval_dataset=samples)
    figures = trainer.evaluate()
    if trainer.is_world_process_zero():
        print_line(f"{len(splits[split]):,} image(s) of split {split!r}")
    if output_dir is not None and trainer.is_world_process_zero():
        write_metrics(figures, Path(output_dir, METRICS))
        evaluated = {"model": model, "dataset": dataset, "split": split}
        write_details({"evaluated": evaluated, **trainer.details}, Path(output_dir, EVALUATION))
        write_classes(trainer.details, Path(output_dir, CLASSES))
        write_plots(trainer.details, output_dir)
        best = [one.best(LIMITS[-1]) for one in trainer.predictions]
        write_predictions(best, matched_ids(categories, splits[split]), Path(output_dir, PREDICTIONS))
        draw_pictures(output_dir, rows, trainer.details)
    return figures


def splits_to_score(load: Callable[..., DatasetDict], model: str, dataset: str) -> tuple[str, DatasetDict]:
    """The split to score a model on where none is named, and the splits of the dataset; `load` is its `load_dataset`.

    It is the valid split, held out of the training split as in training if there is none. Of a dataset with a single
    split that the model was not trained on, all images are scored.
    """
    own = load(hold_out=False)
    if not lacks_validation(own):
        return "valid" if "valid" in own else next(iter(own)), own
    divided = load()
    if len(own) > 1 or ("valid" in divided and was_trained_on(model, divided["train"])):
        return "valid", divided
    images = f"{len(own['train']):,}"
    if was_trained_on(model, own["train"]):
        warn_on_main(
            logger, "%s was trained on all %s images of %s: the figures don't hold for others.", model, images, dataset
        )
    else:
        warn_on_main(
            logger,
            "%s has no record of a training on exactly the annotations of %s, so all %s images are scored. Set --split "
            "valid to score those that a training holds out.",
            model, dataset, images,
        )  # fmt: skip
    return "train", own


def was_trained_on(model: str, rows: Dataset) -> bool:
    """Whether the record beside a model says that it was trained on the annotations of this training split."""
    recorded = read_json(Path(model, FINGERPRINT)).get("train_data")
    return recorded == annotations_digest(first_rows(rows, read_json(Path(model, RECIPE)).get("max_train_samples")))


def evaluates_in_bf16(model: str, precision: Precision) -> bool:
    """Whether to evaluate in bfloat16 autocast, so that "auto" gives the figures of the training."""
    recipe = recipe_of_device(model)
    if precision == "auto" and isinstance(recipe.get("bf16"), bool):
        precision = "bf16" if recipe["bf16"] else "float32"
    return uses_bf16(precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def recipe_of_device(model: str) -> dict[str, Any]:
    """The recipe beside a model that was trained on a device as here, a GPU or a CPU; empty for other models."""
    return read_json(Path(model, RECIPE)) if trained_on_cpu(model) is not torch.accelerator.is_available() else {}


def trained_on_cpu(model: str) -> bool:
    """Whether a model's recipe asked for the CPU, or its trainer_state.json names one as the hardware."""
    with blame_damage(model):
        cost = read_json(Path(model, STATE)).get("stateful_callbacks", {}).get("Cost", {}).get("attributes", {})
        named = str(cost.get("hardware", "")).startswith(CPU)
    return named or read_json(Path(model, RECIPE)).get("use_cpu") is True


def write_predictions(predictions: Sequence[Instances], model_ids: Mapping[int, int], path: Path) -> None:
    """Write predictions in COCO results form, with the category ids of the dataset.

    `model_ids` are those in the model of the dataset's categories. A class that the dataset lacks has its id in the
    model; where that is another class of the dataset, its predictions are left out and their number is logged.
    """
    own = {new: key for key, new in model_ids.items()}
    results = [result for instances in predictions for result in instances.to_coco()]
    ids = {
        key: own.get(key, key) for key in {one["category_id"] for one in results} if key in own or key not in model_ids
    }
    kept = [{**one, "category_id": ids[one["category_id"]]} for one in results if one["category_id"] in ids]
    if len(kept) < len(results):
        logger.warning(
            "%s: %s prediction(s) of classes that the dataset lacks are left out, because their ids are those of other "
            "classes there.",
            path, f"{len(results) - len(kept):,}",
        )  # fmt: skip
    write_atomically(path, json.dumps(kept))
