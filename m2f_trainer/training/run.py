"""The story of a run: recipe -> data -> model -> train -> evaluate -> card."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from m2f_trainer.data.check import check_categories, check_split
from m2f_trainer.data.coco import Category, categories_of
from m2f_trainer.data.collator import InstanceDataset
from m2f_trainer.data.hub import load_dataset
from m2f_trainer.data.sample import write_sample
from m2f_trainer.data.transforms import EvalTransform
from m2f_trainer.errors import ImageError, RecipeError
from m2f_trainer.evaluation.curves import (
    CLASSES,
    EVALUATION,
    read_details,
    read_metrics,
    write_classes,
    write_details,
    write_metrics,
)
from m2f_trainer.evaluation.instances import Instances
from m2f_trainer.evaluation.plots import write_plots
from m2f_trainer.inference.folder import predict_folder
from m2f_trainer.model.adapters import lora_layers, save_adapter
from m2f_trainer.model.backbones import BACKBONES
from m2f_trainer.model.mask2former import M2FModel, load_model
from m2f_trainer.recipe import Recipe, load_recipe
from m2f_trainer.sharing.card import Form, write_card
from m2f_trainer.sharing.results import draw_pictures
from m2f_trainer.sharing.upload import push
from m2f_trainer.train_arguments import TrainArguments
from m2f_trainer.training.automatic import images_a_device, resolve
from m2f_trainer.training.callbacks import EvaluateAtEverySave
from m2f_trainer.training.checkpoints import FINGERPRINT, METRICS, RECIPE
from m2f_trainer.training.console import ClassTable
from m2f_trainer.training.cost import Cost
from m2f_trainer.training.feature_cache import FOLDER as FEATURE_CACHE
from m2f_trainer.training.fingerprint import fingerprint
from m2f_trainer.training.lock import only_run
from m2f_trainer.training.pictures import Pictures
from m2f_trainer.training.plan import plan, to_text
from m2f_trainer.training.preparation import (
    SavedWithModel,
    build,
    eval_transform,
    known,
    load_data,
    require_figure,
    train_transform,
    training_samples,
)
from m2f_trainer.training.resume import as_it_reads, find_resume, from_main, resume_callbacks, starting_point
from m2f_trainer.training.signals import StopOnSignal
from m2f_trainer.training.trainer import M2FTrainer
from m2f_trainer.training.uploads import hub_target, upload_callbacks
from m2f_trainer.training.workers import explained

logger = logging.getLogger(__name__)
ADAPTER_FOLDER, PREDICTIONS = "adapter", "predictions.json"
WORTH_WORKERS = 64  # images; starting and ending worker processes takes longer than reading fewer


def train(recipe: Recipe) -> dict[str, float]:
    """Run a recipe from data to model card; return the figures of the model it ends with.

    Raises RunStopped, a KeyboardInterrupt, when a signal asked it to stop; it is saved by then.
    """
    set_seed(recipe.train.seed)
    with StopOnSignal() as stop, only_run(recipe.train):
        checkpoint = from_main(recipe.train, lambda: find_resume(recipe.train))
        train_rows, splits = load_data(recipe.data)
        categories = categories_of(known(train_rows))
        require_figure(recipe.train.metric_for_best_model, splits["valid"])
        recipe = resolved(recipe, known(train_rows), checkpoint)
        facts = fingerprint(recipe, train_rows, splits["valid"], categories)
        start = from_main(recipe.train, lambda: starting_point(checkpoint, recipe.train, facts))
        model = build(as_it_reads(recipe.model, start), recipe.data, categories)
        trainer = M2FTrainer(
            model,
            recipe.train.for_trainer(),
            train_dataset=training_samples(recipe, train_rows, categories, model),
            eval_dataset=InstanceDataset(splits["valid"], eval_transform(recipe.data), categories),
            callbacks=[*run_callbacks(recipe.train), *resume_callbacks(start), stop],
            fingerprint=facts,
            processing_class=SavedWithModel(recipe, model.config),
        )
        trainer.add_callback(Pictures(trainer))
        with explained(trainer.watched, recipe.train.dataloader_timeout):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
            figures = final_figures(trainer, recipe, splits, categories)
        finish(trainer, recipe, figures, splits["valid"])
    return figures


def resolved(recipe: Recipe, train_rows: Dataset, checkpoint: Path | None = None) -> Recipe:
    """The recipe with a number for every "auto"."""
    categories = categories_of(train_rows)
    rows = InstanceDataset(train_rows, train_transform(recipe), categories)

    def probe(limit: int) -> int:
        found = images_a_device(lambda: build(recipe.model, recipe.data, categories), rows, recipe.train, limit)
        set_seed(recipe.train.seed)
        return found

    return resolve(recipe, len(rows), checkpoint, probe)


def dry_run(recipe: Recipe) -> str:
    """What `train` would do, as text; nothing is trained or written."""
    set_seed(recipe.train.seed)
    rows = known(load_data(recipe.data)[0])
    recipe = resolved(recipe, rows)
    objects = sum(len(some) for some in rows["objects"])
    model = build(recipe.model, recipe.data, categories_of(rows))
    return to_text(plan(model, recipe.train, len(rows), max(1, round(objects / len(rows)))))


def run_callbacks(args: TrainArguments) -> list[TrainerCallback]:
    """What a run does beside its steps."""
    stopping = [EarlyStoppingCallback(args.early_stopping_patience)] if args.early_stopping_patience is not None else []
    return [EvaluateAtEverySave(), ClassTable(), Cost(), *stopping, *upload_callbacks(args)]


def final_figures(
    trainer: M2FTrainer, recipe: Recipe, splits: Mapping[str, Dataset], categories: Sequence[Category]
) -> dict[str, float]:
    """The figures of the model in the trainer's hands: its checkpoint's, and the test split's if there is one."""
    best = trainer.state.best_model_checkpoint if recipe.train.load_best_model_at_end else None
    if not best and not trainer.latest_metrics:  # resumed where nothing was left to train
        trainer.evaluate()
    figures = dict(read_metrics(Path(best, METRICS)) if best else trainer.latest_metrics)
    if trainer.is_world_process_zero():
        details = read_details(Path(best)) if best else trainer.details
        write_details(details, Path(recipe.train.output_dir or ".", EVALUATION))
    if "test" in splits:
        test = InstanceDataset(splits["test"], eval_transform(recipe.data), categories)
        figures |= trainer.predict(test, metric_key_prefix="test").metrics or {}
    return figures


def finish(trainer: M2FTrainer, recipe: Recipe, figures: Mapping[str, float], valid: Dataset) -> None:
    """Write the final model with figures and card, and upload it where the recipe says so."""
    output = Path(recipe.train.output_dir or ".")
    model: M2FModel = trainer.accelerator.unwrap_model(trainer.model)
    trainer.save_model(str(output), _internal_call=True)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        shutil.rmtree(output / FEATURE_CACHE, ignore_errors=True)
        write_metrics(figures, output / METRICS)
        if lora_layers(model):
            save_adapter(model, output / ADAPTER_FOLDER)
        (output / FINGERPRINT).write_text(json.dumps(trainer.fingerprint, indent=2) + "\n", encoding="utf-8")
        illustrate(output, valid)
        write_card(output, Form(pictures=True))
        if recipe.train.push_to_hub:
            push(output, hub_target(recipe.train))
    trainer.accelerator.wait_for_everyone()


def illustrate(output: Path, rows: Dataset) -> None:
    """Draw the card's pictures; a run that was trained to its end doesn't fail for want of them."""
    try:
        draw_pictures(output, rows, read_details(output))
    except ImageError as error:
        logger.warning("The card gets no pictures: %s", error)


def evaluate_folder(
    model: str, dataset: str, split: str = "valid", output_dir: Path | None = None, batch_size: int = 4
) -> dict[str, float]:
    """Score a saved model on a split, by the code that scored it in training; optionally write what came out.

    `output_dir` gets metrics.json, evaluation.json (what reports are made from), classes.csv, charts as PNG and
    predictions.json (COCO results form).

    Raises:
        DataError: an unknown split, or categories of other names
        RecipeError: `output_dir` is a run's folder, whose own figures would be replaced
    """
    if output_dir is not None and Path(output_dir, RECIPE).is_file():
        raise RecipeError(f"{output_dir} holds a run, whose own figures would be replaced. Give another output_dir.")
    loaded = load_model(model)
    splits = load_dataset(dataset)
    check_split(splits, split)
    categories = [Category(**c) for c in loaded.config.categories or []]
    check_categories(categories, splits[split])
    size = (loaded.config.image_height, loaded.config.image_width)
    rows = InstanceDataset(splits[split], EvalTransform(*size), categories)
    arguments = TrainArguments(
        output_dir=str(output_dir or "."),
        per_device_eval_batch_size=batch_size,
        report_to="none",
        bf16=False,
    )
    if len(rows) < WORTH_WORKERS:
        arguments.dataloader_num_workers, arguments.dataloader_persistent_workers = 0, False
    trainer = M2FTrainer(loaded, arguments, eval_dataset=rows)
    figures = trainer.evaluate()
    if output_dir is not None and trainer.is_world_process_zero():
        write_metrics(figures, Path(output_dir, METRICS))
        write_details(trainer.details, Path(output_dir, EVALUATION))
        write_classes(trainer.details, Path(output_dir, CLASSES))
        write_plots(trainer.details, output_dir)
        write_predictions(trainer.predictions, Path(output_dir, PREDICTIONS))
    return figures


def write_predictions(predictions: Sequence[Instances], path: Path) -> None:
    """Write predictions in COCO results form."""
    results = [result for instances in predictions for result in instances.to_coco()]
    path.write_text(json.dumps(results), encoding="utf-8")


def demo(output_dir: Path, backbone: str | None = None, say: Callable[[str], None] = logger.warning) -> None:
    """The whole path on a small made-up dataset: write it, train recipes/quickstart.json, evaluate, draw predictions.

    `backbone`: a pretrained one by name, instead of the small random ViT; it needs the Hub.
    """
    torch.set_num_threads(1)  # tensors this small are slower on several, much slower on a busy machine
    data, run, pictures = output_dir / "data", output_dir / "run", output_dir / "pictures"
    write_sample(data)
    options = ["quickstart", "--dataset_name", str(data), "--output_dir", str(run)]
    if backbone is not None:
        side = str(8 * BACKBONES[backbone].stride if backbone in BACKBONES else 128)
        options += ["--backbone", backbone, "--backbone_config", "null", "--image_height", side, "--image_width", side]
    if (run / RECIPE).is_file():
        shutil.rmtree(run)  # an earlier demo's
    figures = train(load_recipe(options))
    predict_folder(str(run), [data / "test"], pictures)
    say(f"mask AP on the held-out images: {figures['eval_map']:.3f} (valid), {figures['test_map']:.3f} (test)")
    say(f"model: {run}\npictures of the test images: {pictures}\ndataset: {data}")
