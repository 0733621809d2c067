"""transformers' Trainer with Mask2Former's loss normalisation, parameter groups, COCO evaluation and safe checkpoints.

Each overridden method delegates to a function that works without a Trainer. The private ones are pinned by a test.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from m2f_trainer.config.fields import options_of
from m2f_trainer.config.recipe import AUTO
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.data.collate import InstanceDataset, collate, object_counts
from m2f_trainer.data.tiles import EvalTiles, TileOrder, TileTransform
from m2f_trainer.distributed import from_main
from m2f_trainer.errors import CheckpointError, RecipeError
from m2f_trainer.evaluation.coco import LIMITS
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.evaluation.thresholds import class_thresholds
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.postprocess import most_instances, to_instances
from m2f_trainer.inference.tiles import CANDIDATES, Merger
from m2f_trainer.model.criterion import normalizer
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.run_folder import (
    EVALUATION,
    FINGERPRINT,
    METRICS,
    PICKLED_ARGUMENTS,
    read_details,
    write_details,
    write_json,
    write_metrics,
)
from m2f_trainer.training.callbacks.clock import Clock, clock_of
from m2f_trainer.training.callbacks.guards import FiniteGuard
from m2f_trainer.training.callbacks.order import position
from m2f_trainer.training.callbacks.progress import Cost, DataWait, SeedEveryStep, console
from m2f_trainer.training.callbacks.signals import EvaluationStopped
from m2f_trainer.training.callbacks.uploads import NoStockUpload, refuse_stock_upload, running_uploads
from m2f_trainer.training.checkpointing.checkpoints import figures_of_step, rotate, staged
from m2f_trainer.training.cuda_graphs import StepGraphs, can_record
from m2f_trainer.training.data_workers import Watched, watch
from m2f_trainer.training.ema import Average, averaged
from m2f_trainer.training.optimizer import build_optimizer, with_rate_shape
from m2f_trainer.training.sharding import autocast_sharded, keep_float32, require_engine

EMPTY_EPOCH = "There seems not to be a single sample in your epoch_iterator"
"""How transformers' warning of an epoch without a step begins."""
Scorer = Callable[[Sequence[Instances]], Mapping[str, float]]


class M2FTrainer(Trainer):
    """Trains and evaluates an `M2FModel` on `InstanceDataset`s.

    `compute_metrics` takes the predictions of the whole split as a list of `Instances` and returns metrics. By default
    it is the `Evaluator` of that split, whose `details` are kept. `max_minutes` count from `begun`, a time of
    `time.monotonic`; by default from the call of `train`. Everything else is as in transformers' Trainer.
    """

    def __init__(
        self,
        model: M2FModel,
        args: TrainArguments,
        *,
        train_dataset: InstanceDataset | None = None,
        eval_dataset: InstanceDataset | None = None,
        compute_metrics: Scorer | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        fingerprint: Mapping[str, Any] | None = None,
        begun: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, kwargs, (train_dataset, eval_dataset))
        args.start_process_group()  # before accelerate would, and for all copies of args
        require_engine(args, model)
        refuse_stock_upload(args)
        arguments = args.for_trainer()
        arguments.save_total_limit = None  # `rotate` replaces the Trainer's rotation, which uses file times
        arguments.disable_tqdm = bool(args.disable_tqdm) or not sys.stderr.isatty()
        arguments.torch_compile = False  # the Trainer would compile the losses too, anew for each number of objects
        arguments.torch_compile_backend = arguments.torch_compile_mode = None
        keep_float32(arguments)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
            **kwargs,
        )
        autocast_sharded(model, arguments)
        if args.torch_compile:
            model.encoder.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.graphs = StepGraphs(model.model) if args.cuda_graphs and can_record(args) else None
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True
        self.scorer = compute_metrics
        self.predictions: list[Instances] = []
        self.merger: Merger | None = None
        self.limit: int | None = LIMITS[-1]
        self.latest_metrics: dict[str, float] = {}
        self.details: Mapping[str, Any] = {}
        self.fingerprint, self.checkpoints_kept, self.begun = fingerprint, args.save_total_limit, begun
        self.watched: list[Watched] = []
        self.step_batches: list[dict[str, Any]] = []
        self.gradient_norm: Tensor | None = None
        scaled = self.accelerator.scaler is not None
        guard = FiniteGuard(lambda: self.step_batches, lambda: self._tr_loss, lambda: self.gradient_norm, scaled)
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        average = [Average(args.ema_decay)] if args.ema_decay is not None else []
        patience = args.early_stopping_patience
        given = any(isinstance(one, EarlyStoppingCallback) for one in callbacks)
        stopping = [EarlyStoppingCallback(patience)] if patience is not None and not given else []
        bars = console(bars=not arguments.disable_tqdm)
        for callback in [DataWait(), SeedEveryStep(), guard, NoStockUpload(), *stopping, *bars, *average]:
            self.add_callback(callback)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """As the Trainer's; the callback runs at its place in `m2f_trainer.training.callbacks.order.ORDER`."""
        super().add_callback(callback)
        self.callback_handler.callbacks.sort(key=position)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; a run with `max_minutes` gets its clock here.

        A resumed run makes no evaluation at its start (`eval_on_start`): the uninterrupted run has none at that step,
        and early stopping would count it.
        """
        if isinstance(self.args, TrainArguments) and self.args.max_minutes is not None:
            self.remove_callback(Clock)  # of an earlier call
            for clock in clock_of(self.args, self.begun):
                self.add_callback(clock)
        eval_on_start = self.args.eval_on_start
        self.args.eval_on_start = eval_on_start and not resume_from_checkpoint
        log = logging.getLogger("transformers.trainer")
        log.addFilter(self.is_to_be_shown)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            log.removeFilter(self.is_to_be_shown)
            self.args.eval_on_start = eval_on_start

    def is_to_be_shown(self, record: logging.LogRecord) -> bool:
        """Whether to show a warning of transformers: not that an epoch has no samples when a run has ended before it.

        A run that has ended makes no step when it is resumed, see `_get_num_items_in_batch`.
        """
        return not (self.control.should_training_stop and record.getMessage().startswith(EMPTY_EPOCH))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The recipe's optimizer over our parameter groups, unless one was given to the constructor."""
        own: Any = self.model if model is None else model
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.optimizer = build_optimizer(own, self.args)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """transformers' schedule with the recipe's own factors, unless one was given to the constructor."""
        if self.lr_scheduler is None:
            given = self.args.lr_scheduler_kwargs
            if isinstance(self.args, TrainArguments):
                self.args.lr_scheduler_kwargs = self.args.schedule_kwargs(num_training_steps)
            schedule: Any = super().create_scheduler(num_training_steps, optimizer)
            self.args.lr_scheduler_kwargs = given
            self.lr_scheduler = with_rate_shape(schedule, self.args, num_training_steps)  # type: ignore[assignment]
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's. Raises CheckpointError where an earlier version had other groups of parameters."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise CheckpointError(
                f"{checkpoint}: its optimizer has other groups of parameters than this version of m2f_trainer makes. "
                f"Start a new run from its weights, with --init_from {checkpoint}, or resume it with the version that "
                "wrote it."
            ) from error

    def _load_callback_state(self) -> None:
        """As the Trainer's, which replaces callbacks by those of the checkpoint.

        Callbacks that the checkpoint lacks begin anew; a changed patience applies; the clock also counts this process's
        time up to here. The clock and the cost go on counting without `restore_callback_states_from_checkpoint`, too.
        """
        started = {type(one): one for one in self.callback_handler.callbacks}
        state: Any = self.state
        restore = self.args.restore_callback_states_from_checkpoint
        if not restore:
            counts = {Clock.__name__, Cost.__name__} & state.stateful_callbacks.keys()
            state.stateful_callbacks = {name: state.stateful_callbacks[name] for name in counts}
        self.args.restore_callback_states_from_checkpoint = True
        super()._load_callback_state()
        self.args.restore_callback_states_from_checkpoint = restore
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                # without an entry, the first save would raise KeyError
                state.stateful_callbacks.setdefault(type(callback).__name__, {})
            before = started.get(type(callback))
            if isinstance(callback, EarlyStoppingCallback) and isinstance(before, EarlyStoppingCallback):
                callback.early_stopping_patience = before.early_stopping_patience
            if isinstance(callback, Clock) and isinstance(before, Clock) and callback is not before:
                callback.add(before)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """The loss's two divisors, summed over the accumulated micro-batches and the ranks -> float32 (2,).

        A finished run that is resumed gets no batch here: the Trainer would otherwise train one more step each time.
        So does one that its owed evaluation stops early.
        """
        if self.control.should_training_stop or 0 < self.state.max_steps <= self.state.global_step:
            batch_samples.clear()
            self.control.should_training_stop = True
        self.step_batches = batch_samples
        config = self.accelerator.unwrap_model(self.model).config
        if not batch_samples or "class_labels" not in batch_samples[0]:
            return None
        settings = (config.num_queries, config.no_object_weight, config.class_weights or ())
        parts = [normalizer(batch["class_labels"], *settings) for batch in batch_samples]
        total = torch.stack(parts).sum(0).float()
        total = (total.pin_memory() if device.type == "cuda" else total).to(device, non_blocking=True)
        return self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the Trainer's: the norm of all gradients before clipping. It is kept for the guard against NaN."""
        found = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self.gradient_norm = found if isinstance(found, Tensor) else None
        return found

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Turn a batch into `Instances` at once, so that neither logits nor masks are kept or gathered."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        config = self.accelerator.unwrap_model(self.model).config
        top_k = self.limit or most_instances(config.num_queries)
        found = instances_of(outputs, inputs, config.categories, top_k, CANDIDATES if self.merger else 0.0)
        self.predictions += found if self.merger is None else self.merger.add_batch(found, inputs["tile"].tolist())
        return None, None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's. If a signal breaks it off, the step is saved without figures, and RunStopped is raised."""
        if self.graphs is not None:
            self.graphs.release()
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationStopped:
            model: Any = self.model
            self._save_checkpoint(model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)  # raises RunStopped
            raise

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's loop; then the predictions of all ranks are scored once, and every rank gets the figures.

        `predict` returns the predictions as a list of `Instances`.
        """
        self.predictions = []
        dataset = unwatched(dataloader.dataset)
        takes_all = self.scorer is None or isinstance(self.scorer, Evaluator)
        self.limit = None if takes_all and has_dense_images(dataset) else LIMITS[-1]
        self.merger = Merger(dataset.tiling, self.limit) if isinstance(dataset, EvalTiles) else None
        with averaged(self.optimizer):
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        self.predictions, self.details = gather_predictions(self.predictions), {}
        figures = from_main(partial(self._score, dataset))
        if dataset is self.eval_dataset:
            self.store_thresholds(self.details)
        metrics = output.metrics or {}
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.latest_metrics = {**metrics, "step": self.state.global_step}
        found: Any = self.predictions
        return output._replace(metrics=metrics, predictions=found)

    def _load_best_model(self) -> None:
        """As the Trainer's, with the thresholds of the best checkpoint's evaluation."""
        super()._load_best_model()
        self.store_thresholds(read_details(str(self.state.best_model_checkpoint)))

    def _score(self, dataset: Dataset[Any]) -> dict[str, float]:
        """Score the latest predictions, on the main process: the `Evaluator` of a large split takes time and memory."""
        scorer = self.scorer or Evaluator(split_rows(dataset))
        figures = dict(scorer(self.predictions))
        self.details = scorer.details if isinstance(scorer, Evaluator) else {}
        return figures

    def store_thresholds(self, details: Mapping[str, Any]) -> None:
        """Store the best threshold of each class in the model's configuration, which is saved with the weights."""
        config = self.accelerator.unwrap_model(self.model).config
        config.thresholds = class_thresholds(details, [category["id"] for category in config.categories or []])

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Any] | None = None) -> DataLoader[Any]:
        """As the Trainer's, which keeps the loader of the validation samples while its workers persist.

        It would return that loader for any dataset that is given. The loader of another one is not kept, nor its
        workers.
        """
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        persistent, self.args.dataloader_persistent_workers = self.args.dataloader_persistent_workers, False
        try:
            return self.get_test_dataloader(eval_dataset)
        finally:
            self.args.dataloader_persistent_workers = persistent

    def _get_dataloader(self, dataset: Dataset[Any], *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """As the Trainer's, with a time limit, and with a dataset that reports the sample being loaded on errors.

        `dataloader_drop_last` applies to training only: the Trainer would leave images out of evaluations, too.
        """
        limit = self.args.dataloader_timeout if isinstance(self.args, TrainArguments) else 0
        if isinstance(dataset, InstanceDataset):
            dataset = Watched(dataset, self.args.dataloader_num_workers)
            self.watched.append(dataset)
            if isinstance(dataset.dataset, EvalTiles):
                return watch(tile_loader(dataset, dataset.dataset, int(kwargs["batch_size"]), self.args), limit)
            if kwargs.get("is_training") and self.args.train_sampling_strategy == "random":
                transform = dataset.dataset.transform
                if isinstance(transform, TileTransform):
                    kwargs["sampler_fn"] = lambda watched: TileOrder(watched.dataset, transform.seed)
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and bool(kwargs.get("is_training"))
        loader: DataLoader[Any] = super()._get_dataloader(dataset, *args, **kwargs)
        self.args.dataloader_drop_last = drop_last
        return watch(loader, limit)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the Trainer's, without its pickled arguments: recipe.json holds the same values."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(str(output_dir or self.args.output_dir), PICKLED_ARGUMENTS).unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, written to a staging folder with metrics and manifest, then renamed."""
        with staged(self) as folder, averaged(self.optimizer):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                figures = figures_of_step(self.latest_metrics, self.state.global_step)
                write_metrics(figures, folder / METRICS)
                if figures is self.latest_metrics:
                    write_details(self.details, folder / EVALUATION)
            if self.args.should_save and self.fingerprint is not None:
                write_json(folder / FINGERPRINT, self.fingerprint)
        if self.args.should_save:
            output, state = Path(str(self.args.output_dir)), self.state
            in_use = {one.step for one in running_uploads(self.callback_handler.callbacks)}
            rotate(output, self.checkpoints_kept, state.best_global_step, state.global_step, in_use)


def check_arguments(args: object, given: Mapping[str, object], splits: Sequence[object]) -> None:
    """Check what a `M2FTrainer` gets from a notebook.

    Raises:
        TypeError: the arguments are transformers' own, a collator is given, or rows instead of samples
        RecipeError: a number is "auto", which `train` resolves
    """
    if not isinstance(args, TrainArguments):
        raise TypeError(f"args: expected m2f_trainer's TrainArguments, got {type(args).__name__}")
    automatic = [name for name, row in options_of(TrainArguments).items() if row.auto and vars(args)[name] == AUTO]
    if automatic:
        raise RecipeError(
            f"{', '.join(automatic)}: expected a number, got auto, which only m2f train resolves. Give a number, or "
            "train with m2f train."
        )
    if "data_collator" in given:
        raise TypeError("data_collator: M2FTrainer has its own, which takes the samples of an InstanceDataset")
    if any(isinstance(split, datasets.Dataset) for split in splits):
        raise TypeError(
            "train_dataset, eval_dataset: expected samples, got rows. Give InstanceDataset(rows, TrainTransform(height,"
            " width), categories_of(rows)) to train on, and one with EvalTransform(height, width) to evaluate on."
        )


def tile_loader(watched: Watched, tiles: EvalTiles, batch_size: int, args: TrainingArguments) -> DataLoader[Any]:
    """Batches of this rank's tiles, equally many on every rank. accelerate would spread an image's tiles over ranks."""
    tiles.shard(args.process_index, args.world_size, batch_size)
    return DataLoader(
        watched,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def unwatched(dataset: Dataset[Any]) -> Dataset[Any]:
    """The dataset inside a `Watched`; any other dataset is returned unchanged."""
    return dataset.dataset if isinstance(dataset, Watched) else dataset


def split_rows(dataset: Dataset[Any]) -> datasets.Dataset:
    """The rows of an evaluation dataset, to score against. Raises TypeError if it is no `InstanceDataset`."""
    if not isinstance(dataset, InstanceDataset):
        raise TypeError(
            f"expected an InstanceDataset to evaluate on, got {type(dataset).__name__}; or give compute_metrics"
        )
    return dataset.rows


def has_dense_images(dataset: Dataset[Any]) -> bool:
    """Whether an image has more objects than predictions of it count; then the `Evaluator` takes all predictions."""
    return isinstance(dataset, InstanceDataset) and int(object_counts(dataset.rows).max(initial=0)) > LIMITS[-1]


def instances_of(
    outputs: Any,
    inputs: Mapping[str, Any],
    categories: Sequence[Mapping[str, Any]],
    top_k: int = LIMITS[-1],
    threshold: float = 0.0,
) -> list[Instances]:
    """Model outputs of one batch -> predictions at original size, with the dataset's own category ids."""
    return to_instances(
        outputs.class_queries_logits.float(),
        outputs.masks_queries_logits,
        image_ids=inputs["image_id"].tolist(),
        original_sizes=inputs["original_size"].tolist(),
        resized_sizes=inputs["resized_size"].tolist(),
        padded_size=tuple(inputs["pixel_values"].shape[-2:]),
        category_ids=[category["id"] for category in categories],
        top_k=top_k,
        threshold=threshold,
    )


def gather_predictions(predictions: Sequence[Instances]) -> list[Instances]:
    """The predictions of all ranks by image id, without the images that the sampler repeated to fill batches."""
    unique = {instances.image_id: instances for instances in gather_object(list(predictions))}
    return [unique[image_id] for image_id in sorted(unique)]
