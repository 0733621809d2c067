"""The story of a run: recipe -> data -> model -> train -> evaluate -> card."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from m2f_trainer.config.recipe import Recipe
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.data.dataset import Category, categories_of
from m2f_trainer.distributed import from_main
from m2f_trainer.errors import ImageError
from m2f_trainer.hub.model_card import Form, draw_pictures, write_card
from m2f_trainer.hub.upload import push
from m2f_trainer.model.lora import lora_layers, save_adapter
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.run_folder import (
    ADAPTER_FOLDER,
    EVALUATION,
    FEATURE_CACHE,
    FINGERPRINT,
    METRICS,
    read_details,
    read_metrics,
    write_details,
    write_json,
    write_metrics,
)
from m2f_trainer.training.auto import images_a_device, resolve
from m2f_trainer.training.callbacks.pictures import Pictures
from m2f_trainer.training.callbacks.progress import ClassTable, Cost, EvaluateAtEverySave
from m2f_trainer.training.callbacks.signals import StopOnSignal
from m2f_trainer.training.callbacks.uploads import hub_target, upload_callbacks
from m2f_trainer.training.checkpointing.checkpoints import only_run
from m2f_trainer.training.checkpointing.fingerprint import fingerprint
from m2f_trainer.training.checkpointing.resume import as_it_reads, find_resume, resume_callbacks, starting_point
from m2f_trainer.training.data_workers import explained
from m2f_trainer.training.dry_run import plan, to_text
from m2f_trainer.training.prepare import (
    SavedWithModel,
    build,
    eval_transform,
    load_data,
    require_figure,
    train_transform,
    training_samples,
)
from m2f_trainer.training.trainer import M2FTrainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> dict[str, float]:
    """Run a recipe from data to model card; return the figures of the model it ends with.

    Raises RunStopped, a KeyboardInterrupt, when a signal asked it to stop; it is saved by then.
    """
    recipe.train.start_process_group()
    set_seed(recipe.train.seed)
    with StopOnSignal() as stop, only_run(recipe.train):
        checkpoint = from_main(lambda: find_resume(recipe.train))
        train_rows, splits = load_data(recipe.data)
        categories = categories_of(train_rows)
        require_figure(recipe.train.metric_for_best_model, splits["valid"])
        recipe = resolved(recipe, train_rows, checkpoint)
        facts = fingerprint(recipe, train_rows, splits["valid"], categories)
        start = from_main(lambda: starting_point(checkpoint, recipe.train, facts))
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
        trainer.add_callback(
            Pictures(
                trainer.train_dataset,
                trainer.eval_dataset,
                lambda: trainer.predictions,
                lambda: trainer.callback_handler.callbacks,
            )
        )
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
    recipe.train.start_process_group()
    set_seed(recipe.train.seed)
    rows, _ = load_data(recipe.data)
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
        write_json(output / FINGERPRINT, trainer.fingerprint or {})
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
