"""The story of a run: recipe -> data -> model -> train -> evaluate -> card."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from transformers import set_seed
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from m2f_trainer.arguments import DataArguments, ModelArguments, TrainArguments
from m2f_trainer.data.check import check_dataset, check_split
from m2f_trainer.data.coco import Category, categories_of
from m2f_trainer.data.collator import InstanceDataset
from m2f_trainer.data.hub import load_dataset
from m2f_trainer.data.sample import write_sample
from m2f_trainer.data.streams import InstanceStream, Stream, load_stream
from m2f_trainer.data.transforms import EvalTransform, TrainTransform
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
from m2f_trainer.model.adapters import LoraSettings, lora_layers, save_adapter, set_tuning
from m2f_trainer.model.backbones import BACKBONES
from m2f_trainer.model.building import build_model
from m2f_trainer.model.mask2former import M2FConfig, M2FModel, load_model
from m2f_trainer.recipe import Recipe, load_recipe, save_recipe
from m2f_trainer.sharing.card import write_card
from m2f_trainer.sharing.upload import push
from m2f_trainer.training.automatic import images_a_device, resolve
from m2f_trainer.training.callbacks import run_callbacks
from m2f_trainer.training.checkpoints import METRICS, RECIPE
from m2f_trainer.training.feature_cache import FOLDER as FEATURE_CACHE
from m2f_trainer.training.feature_cache import cached
from m2f_trainer.training.fingerprint import fingerprint
from m2f_trainer.training.guards import explained
from m2f_trainer.training.lock import only_run
from m2f_trainer.training.pictures import Pictures
from m2f_trainer.training.plan import plan, to_text
from m2f_trainer.training.resume import find_resume, from_main, resume_callbacks, starting_point
from m2f_trainer.training.signals import StopOnSignal
from m2f_trainer.training.trainer import M2FTrainer
from m2f_trainer.training.uploads import hub_target, upload_callbacks

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
        recipe = resolved(recipe, known(train_rows), checkpoint)
        facts = fingerprint(recipe, train_rows, splits["valid"], categories)
        start = from_main(recipe.train, lambda: starting_point(checkpoint, recipe.train, facts))
        model = build(recipe.model, recipe.data, categories)
        trainer = M2FTrainer(
            model,
            recipe.train.without_upload(),
            train_dataset=training_samples(recipe, train_rows, categories, model),
            eval_dataset=InstanceDataset(splits["valid"], eval_transform(recipe.data), categories),
            callbacks=[*run_callbacks(recipe.train), *upload_callbacks(recipe.train), *resume_callbacks(start), stop],
            fingerprint=facts,
            processing_class=SavedWithModel(recipe, model.config),
        )
        trainer.add_callback(Pictures(trainer))
        with explained(trainer.watched, recipe.train.dataloader_timeout):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
            figures = final_figures(trainer, recipe, splits, categories)
        finish(trainer, recipe, figures)
    return figures


def known(rows: Dataset | Stream) -> Dataset:
    """The training images that can be looked at before a run: of a stream, the first ones."""
    return rows.first if isinstance(rows, Stream) else rows


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


class SavedWithModel:
    """What goes beside the weights in every saved folder: the recipe, and transformers' processor configuration."""

    def __init__(self, recipe: Recipe, config: M2FConfig) -> None:
        self.recipe, self.config = recipe, config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write recipe.json and preprocessor_config.json."""
        save_recipe(self.recipe, Path(folder, RECIPE))
        image_processor(self.config).save_pretrained(folder)


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


def load_data(data: DataArguments) -> tuple[Dataset | Stream, DatasetDict]:
    """Load and check the training split and those to score on; train and valid must be there.

    Raises DataError before any model is touched.
    """
    name, limit = str(data.dataset_name), data.max_train_samples
    stream, splits = load_stream(name) if data.streaming else (None, load_dataset(name))
    scored = [split for split in ("valid", "test") if split == "valid" or split in splits]
    check_dataset(splits, train="" if stream else "train", evaluation=scored)
    to_score = DatasetDict({split: first(splits[split], data.max_eval_samples) for split in scored})
    if stream is None:
        return first(splits["train"], limit), to_score
    return stream if limit is None else stream.take(limit), to_score


def training_samples(
    recipe: Recipe, rows: Dataset | Stream, categories: Sequence[Category], model: M2FModel
) -> InstanceDataset | InstanceStream:
    """The training split as the model is shown it, with what the backbone makes of it where that is to be kept."""
    transform, views = train_transform(recipe), recipe.model.feature_cache
    if isinstance(rows, Stream):
        return InstanceStream(rows, transform, transform.seed)
    samples = InstanceDataset(rows, transform, categories)
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
        seed=recipe.train.data_seed or recipe.train.seed,
        **augment,
    )


def eval_transform(data: DataArguments) -> EvalTransform:
    """Resize and pad, nothing else."""
    return EvalTransform(data.image_height, data.image_width)


def final_figures(
    trainer: M2FTrainer, recipe: Recipe, splits: Mapping[str, Dataset], categories: Sequence[Category]
) -> dict[str, float]:
    """The figures of the model in the trainer's hands: its checkpoint's, and the test split's if there is one."""
    best = trainer.state.best_model_checkpoint if recipe.train.load_best_model_at_end else None
    figures = dict(read_metrics(Path(best, METRICS)) if best else trainer.latest_metrics)
    if trainer.is_world_process_zero():
        details = read_details(Path(best)) if best else trainer.details
        write_details(details, Path(recipe.train.output_dir or ".", EVALUATION))
    if "test" in splits:
        test = InstanceDataset(splits["test"], eval_transform(recipe.data), categories)
        figures |= trainer.predict(test, metric_key_prefix="test").metrics or {}
    return figures


def finish(trainer: M2FTrainer, recipe: Recipe, figures: Mapping[str, float]) -> None:
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
        write_card(output)
        if recipe.train.push_to_hub:
            push(output, hub_target(recipe.train))
    trainer.accelerator.wait_for_everyone()


def evaluate_folder(
    model: str, dataset: str, split: str = "valid", output_dir: Path | None = None, batch_size: int = 4
) -> dict[str, float]:
    """Score a saved model on a split, by the code that scored it in training; optionally write what came out.

    `output_dir` gets metrics.json, evaluation.json (what reports are made from), classes.csv, charts as PNG and
    predictions.json (COCO results form). Raises DataError for an unknown split.
    """
    loaded = load_model(model)
    splits = load_dataset(dataset)
    check_split(splits, split)
    size = (loaded.config.image_height, loaded.config.image_width)
    rows = InstanceDataset(splits[split], EvalTransform(*size), [Category(**c) for c in loaded.config.categories or []])
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
