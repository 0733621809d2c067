"""How a run is trained: transformers' `TrainingArguments` with the defaults of the Mask2Former literature.

One knob, `checkpointing_steps`, keeps saving and evaluation together.
"""

from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from m2f_trainer.config.arguments import check_ranges, option
from m2f_trainer.distributed import meet_afresh
from m2f_trainer.errors import RecipeError

POLYNOMIAL = {"power": 0.9, "lr_end": 0.0}
"""The original's schedule, in the words of transformers' `polynomial`."""


@dataclass
class TrainArguments(TrainingArguments):
    """How it is trained: every `TrainingArguments` field, with our defaults and a few fields of our own.

    Raises RecipeError where a saving or evaluation field contradicts `checkpointing_steps`.
    """

    _argument_group_name = "training"

    checkpointing_steps: str = option(
        "epoch", 'Save and evaluate every so many optimiser steps, or after each "epoch". Sets both together.'
    )
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations in a row without a better metric_for_best_model."
    )
    backbone_lr_multiplier: float | None = option(
        None, "Learning rate of the backbone, as a share of learning_rate. Default: 0.1, or 1 with layer_decay."
    )
    layer_decay: float | None = option(
        None, "What each layer of the backbone has of the rate of the layer above it, such as 0.8. Default: no decay."
    )
    head_first_steps: float = option(
        0.0, "The backbone stands still for so many steps, then warms up; below 1, a share of the run."
    )
    ema_decay: float | None = option(
        None, "Decay of a running average of the weights, which is what is evaluated and saved. Default: none is kept."
    )
    lr_milestones: list[float] | None = option(
        None, "Shares of the run after which the learning rate falls to a tenth. step's default: 0.889 and 0.963."
    )

    output_dir: str | None = option("runs/m2f", "Folder for checkpoints, metrics and the final model.")
    learning_rate: float = option(
        1e-4,
        "Learning rate of neck and head, meant for 16 images an optimiser step; auto scales it by the root of theirs.",
    )
    weight_decay: float = option(0.05, "AdamW weight decay; 0 on norms, biases, queries and level embeddings.")
    max_grad_norm: float = option(0.01, "Gradients are clipped to this norm over the full model.")
    warmup_steps: float = option(0.05, "Warm-up steps; below 1, a share of the run.")
    lr_scheduler_type: str = option(
        "polynomial",
        "Learning rate schedule: polynomial (power 0.9, to 0), cosine, step, or any other of transformers.",
    )
    bf16: bool | None = option(None, "bfloat16. Default: where the GPU has it.")  # type: ignore[assignment]
    per_device_train_batch_size: int = option(
        4, "Training images a device holds at once; auto tries how many fit, up to 16 images an optimiser step."
    )
    num_train_epochs: float = option(3.0, "Passes over the training images; auto goes by their number.")
    per_device_eval_batch_size: int = option(4, "Evaluation images a device holds at once.")
    logging_steps: float = option(20, "Log every so many optimiser steps; below 1, a share of the run.")
    report_to: None | str | list[str] = option(  # noqa: RUF036 (HfArgumentParser takes the second type)
        None, "Loggers. Default: tensorboard where installed."
    )
    save_total_limit: int | None = option(3, "Checkpoints kept, the best one among them.")
    load_best_model_at_end: bool = option(True, "End with the checkpoint that scored best.")
    metric_for_best_model: str | None = option("eval_map", "The evaluation figure that picks the best checkpoint.")
    greater_is_better: bool | None = option(True, "Whether a larger metric_for_best_model is better.")
    dataloader_num_workers: int = option(min(4, cpu_count() or 1), "Processes a device that load and augment images.")
    dataloader_persistent_workers: bool = option(True, "Keep those processes from epoch to epoch.")
    remove_unused_columns: bool = option(False, "Must stay false: the batch carries more than the model's arguments.")
    label_names: list[str] | None = option(["mask_labels", "class_labels"], "Batch keys that hold the truth.")
    ddp_find_unused_parameters: bool | None = option(False, "Not needed: every trained weight has a part in the loss.")
    fsdp: bool | None = option(None, "Shard weights, gradients and moments over the processes (FSDP2).")  # type: ignore[assignment]
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint folder to go on from; true for the newest complete one of output_dir; auto for the same, or a "
        "fresh start where there is none.",
    )
    allow_changes: bool = option(
        False, "Resume although dataset, batch size, world size or settings differ; goes on at the same sample count."
    )
    overwrite_output_dir: bool = option(False, "Delete another run's checkpoints in output_dir and start anew.")
    dataloader_timeout: int = option(600, "Seconds to wait for a batch before a worker counts as hung; 0 is for ever.")
    logging_nan_inf_filter: bool = option(False, "Must stay false: a loss that is not finite ends the run.")
    restore_callback_states_from_checkpoint: bool = option(True, "Resume early stopping's patience too.")
    hub_strategy: str = option("end", "With push_to_hub: upload at the end, or the model of every_save.")
    save_strategy: str | None = option(None, "Follows checkpointing_steps.")  # type: ignore[assignment]
    save_steps: float | None = option(None, "Follows checkpointing_steps.")  # type: ignore[assignment]
    eval_strategy: str | None = option(None, "Follows checkpointing_steps.")  # type: ignore[assignment]
    eval_steps: float | None = option(None, "Follows checkpointing_steps.")

    def __post_init__(self) -> None:
        check_ranges(self, {"early_stopping_patience": (1, None), "backbone_lr_multiplier": (0, None)})
        check_ranges(self, {"layer_decay": (0.01, 1), "head_first_steps": (0, None)})
        check_ranges(self, {"ema_decay": (0, 1)})
        self._require_sound_numbers()
        if self.remove_unused_columns:
            raise RecipeError(
                "remove_unused_columns must stay false: the batch carries more than the model's arguments."
            )
        check_ranges(self, {"dataloader_timeout": (0, None)})
        if self.logging_nan_inf_filter:
            raise RecipeError("logging_nan_inf_filter must stay false: it hides a loss that is not finite.")
        self._refuse_token()
        if self.deepspeed and not find_spec("deepspeed"):
            raise RecipeError("deepspeed isn't installed: pip install deepspeed, or shard with --fsdp true instead.")
        if self.hub_strategy not in ("end", "every_save"):
            raise RecipeError(
                f"hub_strategy: expected end or every_save, got {self.hub_strategy}. Checkpoints with their "
                "optimizer are not uploaded: they hold local paths. Copy output_dir to resume elsewhere."
            )
        self._align_checkpointing()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and not self.deepspeed and computes_in_bf16()
        if self.report_to is None:
            self.report_to = ["tensorboard"] if find_spec("tensorboard") else "none"
        self._resolve_schedule()
        if self.backbone_lr_multiplier is None:
            self.backbone_lr_multiplier = 0.1 if self.layer_decay is None else 1.0
        self.dataloader_persistent_workers = self.dataloader_persistent_workers and self.dataloader_num_workers > 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        meet_afresh(self.ddp_backend or ("gloo" if self.use_cpu else None), timedelta(seconds=self.ddp_timeout))
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # type: ignore[union-attr]

    @property
    def resume(self) -> bool | str:
        """True for the newest checkpoint, "auto" for it or a fresh run, a folder, or False for a fresh run."""
        named = self.resume_from_checkpoint
        words: dict[str, bool | str] = {"none": False, "false": False, "true": True, "auto": "auto"}
        return words.get(str(named).lower(), named or False)

    def for_trainer(self) -> "TrainArguments":
        """A copy for the Trainer, which would upload all of output_dir; `hub.upload.push` sends the files on its list.

        Loggers know the run by its folder's name, unless it has one: a resumed run goes on under that name.
        """
        arguments = copy(self)
        arguments.push_to_hub = False
        arguments.run_name = self.run_name or Path(self.output_dir or ".").resolve().name
        return arguments

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As transformers', but below the length of the run: its polynomial schedule divides by the difference."""
        steps = int(super().get_warmup_steps(num_training_steps))
        return max(0, min(steps, num_training_steps - 1))

    def _require_sound_numbers(self) -> None:
        """What torch or the Trainer would stumble over once the model is built."""
        at_least_one = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        not_negative = ("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers")
        check_ranges(self, dict.fromkeys(at_least_one, (1, None)) | dict.fromkeys(not_negative, (0, None)))
        check_ranges(self, {"seed": (0, 2**32 - 1), "data_seed": (0, 2**32 - 1)})
        if self.max_steps == 0 or self.num_train_epochs == 0:
            raise RecipeError("max_steps and num_train_epochs: expected a run of at least one step, got 0.")

    def _resolve_schedule(self) -> None:
        """Say `step`, which transformers doesn't know, in its words and milestones (the original's)."""
        if self.lr_scheduler_type == "step":
            self.lr_scheduler_type = "constant_with_warmup"
            self.lr_milestones = [0.889, 0.963] if self.lr_milestones is None else self.lr_milestones
        if self.lr_scheduler_type == "polynomial" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = dict(POLYNOMIAL)
        if self.lr_scheduler_type != "polynomial" and self.lr_scheduler_kwargs == POLYNOMIAL:
            self.lr_scheduler_kwargs = None  # what a saved recipe had for its own schedule
        require_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        if not all(0 < share < 1 for share in self.lr_milestones or ()):
            raise RecipeError(f"lr_milestones: expected shares of the run, between 0 and 1, got {self.lr_milestones}.")

    def _refuse_token(self) -> None:
        if self.hub_token is not None:
            raise RecipeError(
                "hub_token: a token was given, and tokens belong in no recipe, command line or file. "
                "Set the environment variable HF_TOKEN or run `hf auth login` instead."
            )

    def _align_checkpointing(self) -> None:
        """Derive the four saving and evaluation fields; one that was given must say the same."""
        every = parse_checkpointing_steps(self.checkpointing_steps)
        self.checkpointing_steps = str(every)
        strategy, steps = ("epoch", None) if every == "epoch" else ("steps", every)
        for kind in ("save", "eval"):
            for name, derived in ((f"{kind}_strategy", strategy), (f"{kind}_steps", steps)):
                given = vars(self)[name]
                if given not in (None, derived):
                    raise RecipeError(
                        f"{name}={given} contradicts checkpointing_steps={every}, which sets saving and evaluation "
                        f"together. Leave {name} out, or set checkpointing_steps to a number of steps or 'epoch'."
                    )
                setattr(self, name, derived)


def parse_checkpointing_steps(value: str | int) -> int | str:
    """'epoch', or a number of optimiser steps of at least 1. Raises RecipeError."""
    text = str(value)
    if text == "epoch":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise RecipeError(f'checkpointing_steps: expected a whole number of steps from 1 on or "epoch", got {value!r}.')


def require_schedule(name: str, settings: Any) -> None:
    """Raise RecipeError where transformers can't make the schedule of these settings."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(name, optimizer, 1, 2, settings if isinstance(settings, dict) else None)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"lr_scheduler_type {name} with lr_scheduler_kwargs {settings}: {error}.") from error


def computes_in_bf16() -> bool:
    """Whether the GPU has bfloat16 units; emulation would be slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
