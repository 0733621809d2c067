"""A training run from recipe to model card. `train` calls its steps in order; each takes values and returns values."""

import logging
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import save
from transformers import TrainerCallback, set_seed

from m2f_trainer.config.arguments import ModelArguments
from m2f_trainer.config.recipe import Recipe
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.collate import InstanceDataset
from m2f_trainer.distributed import from_main, leave
from m2f_trainer.errors import ImageError
from m2f_trainer.evaluation.gallery import draw_pictures
from m2f_trainer.hub.licences import commercial_warning, licence_chain
from m2f_trainer.hub.model_card import CardOptions, write_card
from m2f_trainer.hub.upload import Target, push
from m2f_trainer.model.lora import lora_layers, save_adapter
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.model.sources import ModelError
from m2f_trainer.model.weights import HEAD_FILE, head_tensors
from m2f_trainer.run_folder import (
    ADAPTER_FOLDER,
    EVALUATION,
    FEATURE_CACHE,
    FINGERPRINT,
    METRICS,
    RESUME_STAGING,
    read_details,
    read_json,
    read_metrics,
    write_atomically,
    write_details,
    write_json,
    write_metrics,
)
from m2f_trainer.training.allocator import keep_freed_memory
from m2f_trainer.training.auto import images_per_device, resolve, with_checkpoint_range, with_pixel_range
from m2f_trainer.training.callbacks.pictures import Pictures
from m2f_trainer.training.callbacks.progress import ClassTable, Cost, EvaluateAtEverySave
from m2f_trainer.training.callbacks.signals import StopOnSignal
from m2f_trainer.training.callbacks.uploads import (
    hub_target,
    report_broken_uploads,
    running_uploads,
    upload_callbacks,
)
from m2f_trainer.training.checkpointing.checkpoints import run_lock
from m2f_trainer.training.checkpointing.fingerprint import fingerprint
from m2f_trainer.training.checkpointing.resume import (
    OwedEvaluation,
    delete_former_run,
    evaluation_owed,
    find_checkpoint,
    find_start,
    has_ended,
    resume_callbacks,
)
from m2f_trainer.training.data_workers import translate_errors
from m2f_trainer.training.dry_run import plan, plan_text
from m2f_trainer.training.prepare import (
    Data,
    SavedWithModel,
    augmentation_seed,
    build_recipe_model,
    check_sources,
    eval_samples,
    load_data,
    report_overfull,
    require_batch,
    require_figure,
    train_samples,
    with_class_weights,
    with_feature_cache,
)
from m2f_trainer.training.trainer import M2FTrainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> dict[str, float]:
    """Run a recipe from data to model card; return the figures of the final model.

    Raises RunStopped, a KeyboardInterrupt, when a signal asked the run to stop; a checkpoint is saved by then.
    """
    begun = time.monotonic()
    begin(recipe)
    with StopOnSignal() as stop, run_lock(Path(recipe.train.output_dir or "."), held=recipe.train.process_index == 0):
        checkpoint = from_main(partial(find_checkpoint, recipe.train))
        if checkpoint is None:
            check_sources(recipe.model)
        recipe = with_checkpoint_range(recipe, checkpoint)
        data = load_data(recipe.data)
        recipe = with_pixel_range(recipe, data.pixel_range)
        require_figure(recipe.train.metric_for_best_model, data.valid)
        samples = train_samples(data.train, recipe.data, augmentation_seed(recipe.train), data.categories)
        recipe = with_class_weights(resolve_auto(recipe, samples, checkpoint), samples)
        require_batch(samples, recipe.train)
        report_overfull(samples, recipe.model.num_queries)
        facts = fingerprint(recipe, data.train, data.valid, data.categories, len(samples))
        start = from_main(partial(find_start, checkpoint, recipe.train, facts))
        model = build_recipe_model(recipe.model, recipe.data, data.categories, checkpoint)
        if recipe.train.process_index == 0:
            report_licences(model)
        callbacks = [*run_callbacks(recipe.train), *resume_callbacks(start), stop]
        views = None if has_ended(start, recipe.train, facts) else recipe.model.feature_cache
        samples = with_feature_cache(samples, model, views, recipe.train)
        trainer = make_trainer(model, recipe, samples, data, facts, callbacks, begun)
        if checkpoint is None and recipe.train.overwrite_output_dir:
            from_main(partial(delete_former_run, Path(recipe.train.output_dir or ".")))
        if start is not None and evaluation_owed(start):
            trainer.add_callback(OwedEvaluation(trainer, start))
        with translate_errors(trainer.watched, recipe.train.dataloader_timeout), report_broken_uploads(callbacks):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
            test = eval_samples(data.test, model.config, data.categories) if data.test is not None else None
            figures = evaluate(trainer, test)
        finish(trainer, figures, data.valid, hub_target(recipe.train) if recipe.train.push_to_hub else None)
        if recipe.train.save_head and recipe.train.process_index == 0:
            save_head(Path(recipe.train.output_dir or "."), Path(recipe.train.save_head))
    return figures


def begin(recipe: Recipe) -> None:
    """Start the process group, check packages, and set memory allocation and the seed."""
    recipe.train.start_process_group()
    recipe.train.require_packages()
    if recipe.train.device.type == "cpu":
        keep_freed_memory()
    set_seed(recipe.train.seed)


def dry_run(recipe: Recipe) -> str:
    """What `train` would do, as text; nothing is trained or written."""
    begin(recipe)
    check_sources(recipe.model)
    data = load_data(recipe.data)
    recipe = with_pixel_range(recipe, data.pixel_range)
    samples = train_samples(data.train, recipe.data, augmentation_seed(recipe.train), data.categories)
    recipe = with_class_weights(resolve_auto(recipe, samples, None), samples)
    require_batch(samples, recipe.train)
    model = build_recipe_model(recipe.model, recipe.data, data.categories)
    instances, views = max(1, round(samples.objects().mean())), recipe.model.feature_cache or 0
    return plan_text(plan(model, recipe.train, len(samples), instances, views))


def resolve_auto(recipe: Recipe, samples: InstanceDataset, checkpoint: Path | None) -> Recipe:
    """The recipe with a number for every "auto"; a resumed run keeps the numbers of its checkpoint."""

    def probe(model: ModelArguments, limit: int) -> int:
        make_model = partial(build_recipe_model, model, recipe.data, samples.categories)
        found = images_per_device(make_model, samples, recipe.train, limit)
        set_seed(recipe.train.seed)
        return found

    return resolve(recipe, samples, checkpoint, probe)


def report_licences(model: M2FModel) -> None:
    """Log which of the initial weights rule out commercial use, if any do."""
    warning = commercial_warning(licence_chain(model.config.to_dict()))
    if warning is not None:
        logger.warning("%s", warning)


def make_trainer(
    model: M2FModel,
    recipe: Recipe,
    samples: InstanceDataset,
    data: Data,
    facts: Mapping[str, Any],
    callbacks: list[TrainerCallback],
    begun: float,
) -> M2FTrainer:
    """The Trainer of a run; it saves the recipe and `facts`, its fingerprint, with every checkpoint.

    `begun`: when the run began, by `time.monotonic`.
    """
    trainer = M2FTrainer(
        model,
        recipe.train.for_trainer(),
        train_dataset=samples,
        eval_dataset=eval_samples(data.valid, model.config, data.categories),
        callbacks=callbacks,
        fingerprint=facts,
        begun=begun,
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
    return trainer


def run_callbacks(args: TrainArguments) -> list[TrainerCallback]:
    """The callbacks of a run besides those of `M2FTrainer`; `callbacks.order` defines their order."""
    return [EvaluateAtEverySave(), ClassTable(), Cost(), *upload_callbacks(args)]


def evaluate(trainer: M2FTrainer, test: InstanceDataset | None) -> dict[str, float]:
    """Figures of the trained model: those of its checkpoint on the valid split, and of the test split if there is one.

    Writes the details of the former to evaluation.json in the run's folder.
    """
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if not best and not trainer.latest_metrics:  # a finished run was resumed
        trainer.evaluate()
    figures = dict(read_metrics(Path(best, METRICS)) if best else trainer.latest_metrics)
    if trainer.is_world_process_zero():
        details = read_details(Path(best)) if best else trainer.details
        write_details(details, Path(trainer.args.output_dir or ".", EVALUATION))
    if test is not None:
        figures |= trainer.predict(test, metric_key_prefix="test").metrics or {}
    return figures


def finish(trainer: M2FTrainer, figures: Mapping[str, float], valid: Dataset, target: Target | None) -> None:
    """Write the final model with figures and card into the run's folder, and upload it to `target` if there is one.

    Pictures, card and upload have no bound in time, so the ranks leave their group before: none waits for the main one.
    """
    output = Path(trainer.args.output_dir or ".")
    model: M2FModel = trainer.accelerator.unwrap_model(trainer.model)
    trainer.save_model(str(output), _internal_call=True)
    trainer.save_state()
    is_main = trainer.accelerator.is_main_process
    trainer.accelerator.wait_for_everyone()
    leave()
    if is_main:
        for temporary in (FEATURE_CACHE, RESUME_STAGING):
            shutil.rmtree(output / temporary, ignore_errors=True)
        write_metrics(figures, output / METRICS)
        if lora_layers(model):
            write_adapter(model, output / ADAPTER_FOLDER)
        write_json(output / FINGERPRINT, trainer.fingerprint or {})
        illustrate(output, valid)
        write_card(output, CardOptions(pictures=True))
        if target is not None:
            for upload in running_uploads(trainer.callback_handler.callbacks):
                upload.wait()
            push(output, target)


def write_adapter(model: M2FModel, folder: Path) -> None:
    """Write the LoRA adapter of a run, or log why there is none; the whole model is there in any case."""
    try:
        save_adapter(model, folder)
    except ModelError as error:
        logger.warning("%s is not written: %s", folder, error)


def save_head(model: Path, folder: Path) -> None:
    """Write the weights of a model's folder without the backbone's, and its configuration, for `head_checkpoint`."""
    config = read_json(model / "config.json")
    config.pop("auto_map", None)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / HEAD_FILE, save(head_tensors(str(model)), {"format": "pt"}))
    write_json(folder / "config.json", config)


def illustrate(output: Path, rows: Dataset) -> None:
    """Draw the card's pictures. If an image can't be read they are left out; the finished run does not fail."""
    try:
        draw_pictures(output, rows, read_details(output))
    except ImageError as error:
        logger.warning("The card gets no pictures: %s", error)
