"""Recipe fields of the training: transformers' `TrainingArguments` with the defaults of the Mask2Former literature.

`checkpointing_steps` sets the interval of saving and of evaluation, which are always done together.
"""

import difflib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import integration_utils as loggers
from transformers.utils.import_utils import enable_tf32, is_torch_tf32_available

from m2f_trainer.config.bfloat16 import gpu_computes_in_bf16
from m2f_trainer.config.cores import usable_cores
from m2f_trainer.config.fields import Theme, check_ranges, option
from m2f_trainer.distributed import leave_at_exit, start_group
from m2f_trainer.errors import RecipeError

logger = logging.getLogger(__name__)

MUON = "muon"
UNKNOWN = 10**9
"""The Trainer's max_steps in a run with max_minutes, which the clock ends."""

SCHEDULE_DEFAULTS: dict[str, dict[str, Any]] = {
    "polynomial": {"power": 0.9, "lr_end": 0.0},
    "warmup_stable_decay": {"num_decay_steps": 0.2, "decay_type": "1-sqrt"},
}
"""Arguments of transformers' learning rate schedules, where none are given: Mask2Former's schedule, and the decay of
Hägele et al. 2024 (https://arxiv.org/abs/2405.18392). Numbers of steps below 1 are fractions of the run."""
STEP_MILESTONES = [0.889, 0.963]
"""The milestones of `step`: 327,778 and 355,092 of the 368,750 steps of Mask2Former's COCO configuration."""
BY_FIGURES = ("reduce_lr_on_plateau", "greedy")
"""The schedules of transformers that are no function of the step."""
SCHEDULE_STEPS = ("num_decay_steps", "num_stable_steps")
"""The arguments of schedules that count steps."""

LOGGERS: dict[str, tuple[Callable[[], bool], str]] = {
    "azure_ml": (loggers.is_azureml_available, "pip install azureml-sdk"),
    "clearml": (loggers.is_clearml_available, "pip install clearml"),
    "codecarbon": (loggers.is_codecarbon_available, "pip install codecarbon"),
    "comet_ml": (loggers.is_comet_available, "pip install comet-ml"),
    "dagshub": (loggers.is_dagshub_available, "pip install dagshub mlflow"),
    "dvclive": (loggers.is_dvclive_available, "pip install dvclive"),
    "flyte": (loggers.is_flytekit_available, "pip install flytekit"),
    "kubeflow": (loggers.is_kubeflow_available, "its environment variable KUBEFLOW_TRAINER_SERVER_URL is not set"),
    "mlflow": (loggers.is_mlflow_available, "pip install mlflow"),
    "neptune": (loggers.is_neptune_available, "pip install neptune"),
    "swanlab": (loggers.is_swanlab_available, "pip install swanlab"),
    "tensorboard": (loggers.is_tensorboard_available, "pip install tensorboard"),
    "trackio": (loggers.is_trackio_available, "pip install trackio"),
    "wandb": (loggers.is_wandb_available, "pip install wandb"),
}
"""Names for `report_to` -> whether the logger is available, and what to do if it isn't."""

UNSUPPORTED: dict[str, tuple[object, str]] = {
    "remove_unused_columns": (
        False, "must stay false, since collate needs columns that are no argument of the model's forward"
    ),
    "use_liger_kernel": (False, "has kernels for language models only"),
    "neftune_noise_alpha": (None, "adds noise to the embeddings of words, which no image has"),
    "label_smoothing_factor": (0, "has no effect on the losses of Mask2Former"),
    "logging_nan_inf_filter": (False, "must stay false, since it would hide a non-finite loss"),
    "debug": ("", "would stop the run at its own checks; a non-finite loss ends a run with a report without it"),
    "bf16_full_eval": (False, "would convert the trained weights to bfloat16; evaluations follow bf16"),
    "fp16_full_eval": (False, "would convert the trained weights to float16; evaluations follow fp16"),
    "average_tokens_across_devices": (
        True, "must stay true: the gradients would be divided by the number of processes once too often"
    ),
    "auto_find_batch_size": (
        False, "would record another batch size than it trains with; use per_device_train_batch_size auto"
    ),
    "enable_jit_checkpoint": (False, "would replace the checkpoint that every run writes at SIGTERM"),
    "eval_delay": (0, "contradicts that every checkpoint is evaluated"),
    "ignore_data_skip": (False, "would train a resumed run on samples that it has seen in this epoch"),
}  # fmt: skip
"""Fields of transformers that contradict this package -> the value that they keep, and what another one does."""

ACCELERATOR_UNSUPPORTED: dict[str, tuple[object, str]] = {
    "split_batches": (False, "would divide per_device_train_batch_size by the number of processes"),
    "dispatch_batches": (False, "can't cut batches whose masks have another size for each image"),
    "use_seedable_sampler": (True, "must stay true, since a resumed run would draw the samples in another order"),
}
"""The same for the fields of `accelerator_config`."""

LAUNCHER_ENGINES = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
"""Environment variables by which `accelerate launch` switches an engine on -> the recipe's field for it."""

DEFAULT_WARMUP = 0.05

LAUNCHED = {"LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
"""Environment variables of launchers, by which accelerate knows that there are several processes."""

MAX_SEED = 2**32 - 1  # numpy takes no larger one
FIXED: Theme = "fixed or derived (not to be set)"


@dataclass
class TrainArguments(TrainingArguments):
    """The training: every `TrainingArguments` field, with other defaults and a few more fields.

    Raises:
        RecipeError: a number is out of range, or two fields contradict each other.
    """

    num_train_epochs: float = option(
        3.0,
        "Number of passes over the training images; auto chooses by the number of images.",
        "length and batch",
        changes_results=True,
        auto=True,
    )
    max_steps: int = option(
        -1,
        "Number of optimizer steps, overriding num_train_epochs; -1 trains by epochs.",
        "length and batch",
        changes_results=True,
    )
    max_minutes: float | None = option(
        None,
        "Train for this many minutes of wall time instead of epochs or steps. Everything counts but the last "
        "evaluation, the last save and the final test; the learning rate schedule follows the time.",
        "length and batch",
        at_least=0.01,
        changes_results=True,
    )
    per_device_train_batch_size: int = option(
        4,
        "Training images per device and forward pass; auto finds how many fit, up to 16 images per optimizer step.",
        "length and batch",
        at_least=1,
        changes_results=True,
        auto=True,
    )
    gradient_accumulation_steps: int = option(
        1,
        "Number of batches whose gradients are accumulated before an optimizer step; auto: as many as make 16 images.",
        "length and batch",
        at_least=1,
        changes_results=True,
        auto=True,
    )
    dataloader_drop_last: bool = option(
        False, "Drop the last batch of an epoch if it is incomplete.", "length and batch", changes_results=True
    )
    train_sampling_strategy: str = option(
        "random", "Order of the training samples: random or sequential.", "length and batch", changes_results=True
    )
    seed: int = option(
        42,
        "Seed of initialisation, data order and augmentation.",
        "length and batch",
        at_least=0,
        at_most=MAX_SEED,
        changes_results=True,
    )
    data_seed: int | None = option(
        None,
        "Seed of the data order. Default: seed.",
        "length and batch",
        at_least=0,
        at_most=MAX_SEED,
        changes_results=True,
    )

    learning_rate: float = option(
        1e-4,
        "Peak learning rate of neck and head, for 16 images per optimizer step; auto scales it with the square root of "
        "the images per step.",
        "learning rate and optimizer",
        at_least=0,
        changes_results=True,
        auto=True,
    )
    lr_scheduler_type: str = option(
        "polynomial",
        "Learning rate schedule: polynomial (power 0.9, down to 0), cosine, step, warmup_stable_decay (falls in the "
        "last fifth of the run), or any other of transformers.",
        "learning rate and optimizer",
        changes_results=True,
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = option(
        None,
        "Arguments of the schedule, as transformers' get_scheduler takes them; num_decay_steps and num_stable_steps "
        "below 1 are fractions of the run.",
        "learning rate and optimizer",
        changes_results=True,
    )
    lr_milestones: list[float] | None = option(
        None,
        "Multiply the learning rate by 0.1 after these fractions of the run. Default with step: 0.889 and 0.963.",
        "learning rate and optimizer",
        changes_results=True,
    )
    warmup_steps: float = option(
        DEFAULT_WARMUP,
        "Linear warm-up, in optimizer steps; below 1, as a fraction of the run.",
        "learning rate and optimizer",
        changes_results=True,
    )
    backbone_lr_multiplier: float | None = option(
        None,
        "Learning rate of the backbone as a multiple of learning_rate. Default: 0.1, or 1 with layer_decay.",
        "learning rate and optimizer",
        at_least=0,
        changes_results=True,
    )
    layer_decay: float | None = option(
        None,
        "Layer-wise learning rate decay: each backbone layer has this multiple of the rate of the layer above it, such "
        "as 0.8. Default: none.",
        "learning rate and optimizer",
        at_least=0.01,
        at_most=1,
        changes_results=True,
    )
    head_first_steps: float = option(
        0.0,
        "Keep the backbone frozen for this many optimizer steps, then warm it up; below 1, a fraction of the run.",
        "learning rate and optimizer",
        at_least=0,
        changes_results=True,
    )
    optim: str | None = option(  # type: ignore[assignment]
        None,
        "Optimizer: muon (Muon for the matrices of neck and head, AdamW for everything else), or any of transformers "
        "by its name. Default: muon, or adamw_torch_fused with fsdp or deepspeed, which shard matrices.",
        "learning rate and optimizer",
        changes_results=True,
    )
    weight_decay: float = option(
        0.05,
        "AdamW weight decay; 0 for norms, biases, queries and level embeddings.",
        "learning rate and optimizer",
        at_least=0,
        changes_results=True,
    )
    adam_beta1: float = option(
        0.9, "AdamW's decay of the mean of gradients.", "learning rate and optimizer", at_least=0, changes_results=True
    )
    adam_beta2: float = option(
        0.999,
        "AdamW's decay of the mean of squared gradients.",
        "learning rate and optimizer",
        at_least=0,
        changes_results=True,
    )
    adam_epsilon: float = option(
        1e-8,
        "Added to the denominator of AdamW's update.",
        "learning rate and optimizer",
        at_least=0,
        changes_results=True,
    )
    max_grad_norm: float = option(
        0.01,
        "Clip the norm of all gradients together to this value.",
        "learning rate and optimizer",
        at_least=0,
        changes_results=True,
    )
    ema_decay: float | None = option(
        None,
        "Keep an exponential moving average of the weights with this decay; the average is evaluated and saved. "
        "Default: none.",
        "learning rate and optimizer",
        at_least=0,
        at_most=1,
        changes_results=True,
    )

    checkpointing_steps: str = option(
        "epoch",
        'Save and evaluate every N optimizer steps, or after each "epoch".',
        "evaluation and best checkpoint",
        json_type=int,
    )
    load_best_model_at_end: bool = option(
        True, "End with the model of the best checkpoint instead of the last.", "evaluation and best checkpoint"
    )
    metric_for_best_model: str | None = option(
        "eval_map", "The metric that selects the best checkpoint.", "evaluation and best checkpoint"
    )
    greater_is_better: bool | None = option(
        True, "Whether a larger metric_for_best_model is better.", "evaluation and best checkpoint"
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop after this many evaluations in a row without a better metric_for_best_model.",
        "evaluation and best checkpoint",
        at_least=1,
    )

    output_dir: str | None = option(
        "runs/m2f", "Folder for checkpoints, metrics and the final model.", "checkpoints and resumption"
    )
    save_head: str | None = option(
        None,
        "Folder for the trained model without its backbone, for later runs: --head_checkpoint FOLDER, also on another "
        "backbone.",
        "checkpoints and resumption",
    )
    save_total_limit: int | None = option(
        3, "Number of checkpoints to keep, including the best one.", "checkpoints and resumption"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint folder to resume from; true for the newest complete one in output_dir; auto for the same, or a new "
        "run if there is none.",
        "checkpoints and resumption",
        json_type=bool,
    )
    allow_changes: bool = option(
        False,
        "Resume although dataset, batch size, world size or settings differ; training continues after the same number "
        "of samples.",
        "checkpoints and resumption",
    )
    overwrite_output_dir: bool = option(
        False,
        "Start a new run in the output_dir of another one, whose checkpoints and final model are deleted when training "
        "starts. Only on the command line.",
        "checkpoints and resumption",
        saved=False,
    )
    restore_callback_states_from_checkpoint: bool = option(
        True, "Resume the state of early stopping, too.", "checkpoints and resumption"
    )

    bf16: bool | None = option(  # type: ignore[assignment]
        None,
        "Train in bfloat16 mixed precision. Default: where a GPU supports it.",
        "precision and memory",
        changes_results=True,
    )
    fp16: bool = option(False, "Train in float16 mixed precision.", "precision and memory", changes_results=True)
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass: less memory, more time.", "precision and memory"
    )
    cuda_graphs: bool = option(
        True,
        "Record a training step on one GPU as CUDA graphs: less time, most of all on small images. No effect with "
        "several processes or gradient_checkpointing.",
        "precision and memory",
    )
    fsdp: bool | None = option(  # type: ignore[assignment]
        None, "Shard weights, gradients and optimizer states over all processes (FSDP2).", "precision and memory"
    )

    per_device_eval_batch_size: int = option(4, "Evaluation images per device and forward pass.", "machine", at_least=1)
    dataloader_num_workers: int = option(
        min(4, usable_cores()), "Processes per device that load and augment images.", "machine", at_least=0
    )
    dataloader_persistent_workers: bool = option(True, "Keep these processes alive between epochs.", "machine")
    dataloader_timeout: int = option(
        600, "Seconds to wait for a batch before a worker counts as hung; 0 waits forever.", "machine", at_least=0
    )

    logging_steps: float = option(
        20, "Log every N optimizer steps; below 1, as a fraction of the run.", "logs and uploads"
    )
    report_to: None | str | list[str] = option(  # noqa: RUF036 (HfArgumentParser takes the second type)
        None, "Loggers, by transformers' names for them. Default: tensorboard if installed.", "logs and uploads"
    )
    push_to_hub: bool = option(
        False, "Upload the model to the Hugging Face Hub. The token is read from HF_TOKEN.", "logs and uploads"
    )
    hub_model_id: str | None = option(
        None, "Repository to upload to: name/model. Default: the name of output_dir.", "logs and uploads"
    )
    hub_strategy: str = option(
        "end", "With push_to_hub: upload at the end, or the model of every_save.", "logs and uploads"
    )

    remove_unused_columns: bool = option(
        False, "Must stay false: collate needs columns that are no argument of the model's forward.", FIXED
    )
    label_names: list[str] | None = option(
        ["mask_labels", "class_labels"], "Batch keys that hold the ground truth.", FIXED
    )
    logging_nan_inf_filter: bool = option(False, "Must stay false: a non-finite loss stops the run.", FIXED)
    ddp_find_unused_parameters: bool | None = option(
        False, "Not needed: every trained parameter contributes to the loss.", FIXED
    )
    save_strategy: str | None = option(  # type: ignore[assignment]
        None, "Derived from checkpointing_steps.", FIXED, saved=False
    )
    save_steps: float | None = option(  # type: ignore[assignment]
        None, "Derived from checkpointing_steps.", FIXED, saved=False
    )
    eval_strategy: str | None = option(  # type: ignore[assignment]
        None, "Derived from checkpointing_steps.", FIXED, saved=False
    )
    eval_steps: float | None = option(None, "Derived from checkpointing_steps.", FIXED, saved=False)
    local_rank: int = option(-1, "Set by the launcher, such as torchrun.", FIXED, saved=False)
    hub_token: str | None = option(
        None, "Rejected: a token must not be in a recipe or command. Set HF_TOKEN instead.", FIXED, saved=False
    )

    _constructed = False
    _cpu_requested = False

    def __post_init__(self) -> None:
        check_ranges(self)
        self._cpu_requested = self.use_cpu
        if not torch.accelerator.is_available() and not self.deepspeed:
            self.use_cpu = True  # without it, accelerate starts no group on a CPU: each rank would train alone
        if self.full_determinism and not self.use_cpu and torch.cuda.is_available():
            raise RecipeError(
                "full_determinism: torch has no deterministic backward of grid_sample on CUDA, so the first step would "
                "fail. Leave it out: two runs with the same seed then differ by rounding."
            )
        self._require_length()
        refuse_unsupported(vars(self), UNSUPPORTED)
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise RecipeError(
                f"train_sampling_strategy={self.train_sampling_strategy}: expected random or sequential. Others "
                "sort texts by their length."
            )
        if self.hub_token is not None:
            raise RecipeError(
                "hub_token: tokens are not accepted in a recipe, command line or file. Set the environment variable "
                "HF_TOKEN or run `hf auth login` instead."
            )
        if self.deepspeed and not find_spec("deepspeed"):
            raise RecipeError(
                "deepspeed is not installed: pip install 'm2f-trainer[deepspeed]', or shard with --fsdp true instead."
            )
        if self.hub_strategy not in ("end", "every_save"):
            raise RecipeError(
                f"hub_strategy: expected end or every_save, got {self.hub_strategy}. Checkpoints with their "
                "optimizer state are not uploaded, since they contain local paths. To resume elsewhere, copy "
                "output_dir."
            )
        if self.save_head and not self._continues() and Path(self.save_head, "config.json").exists():
            raise RecipeError(
                f"save_head={self.save_head}: this folder holds a model already. Give a new folder, or delete this one."
            )
        self._align_checkpointing()
        self._resolve_schedule()
        self._require_metric()
        if self.max_minutes is not None:
            self._require_fractions()
        self._follow_launcher()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and not self.deepspeed and gpu_computes_in_bf16()
        if self.report_to is None:
            self.report_to = ["tensorboard"] if find_spec("tensorboard") else "none"
        require_known_loggers([self.report_to] if isinstance(self.report_to, str) else self.report_to)
        if self.backbone_lr_multiplier is None:
            self.backbone_lr_multiplier = default_backbone_multiplier(self.layer_decay)
        self.dataloader_persistent_workers = self.dataloader_persistent_workers and self.dataloader_num_workers > 0
        if self.dataloader_num_workers == 0:
            self.dataloader_multiprocessing_context = None  # of the workers
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        optim = self._optimizer()
        self.optim = TrainingArguments.default_optim if optim == MUON else optim  # transformers doesn't know muon
        super().__post_init__()  # type: ignore[no-untyped-call]
        refuse_unsupported(vars(self.accelerator_config), ACCELERATOR_UNSUPPORTED, " in accelerator_config")
        if self.tf32 is None and not self.use_cpu and is_torch_tf32_available():
            enable_tf32(True)  # what bfloat16 autocast leaves in float32: the sampling locations of the pixel decoder
        if optim != MUON:
            require_optimizer(self, optim)
        self.optim = MUON if optim == MUON else self.optim
        self._constructed = True
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # type: ignore[union-attr]

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with `use_cpu` as it was given: a saved recipe uses the accelerator of another machine."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return values | {"use_cpu": self._cpu_requested}

    def start_process_group(self) -> None:
        """Choose the device and, under a launcher such as torchrun, start the process group, unless this has been done.

        transformers does it when the arguments are constructed; here only DeepSpeed does, whose configuration needs the
        number of processes. Otherwise the first use of the device, rank or world size calls this.
        """
        _ = self._setup_devices

    def require_packages(self) -> None:
        """Check that this machine has what the recipe's loggers and compiler need, before the data is read.

        Raises:
            RecipeError: it hasn't; the message names what is missing.
        """
        for name in self.report_to or ():
            is_there, remedy = LOGGERS.get(name, (lambda: True, ""))
            if not is_there():
                raise RecipeError(f"report_to={name}: not available here; {remedy}. Or give other loggers, or none.")
        if self.torch_compile:
            try:
                compiled = torch.compile(
                    torch.neg, backend=str(self.torch_compile_backend), mode=self.torch_compile_mode
                )
                compiled(torch.ones(2, device=self.device))
            except Exception as error:  # of torch's compiler, or of one of the many packages that it uses
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise RecipeError(
                    f"torch_compile with the backend {self.torch_compile_backend} and the mode "
                    f"{self.torch_compile_mode} fails on this machine: {reason}. The usual backend is inductor, which "
                    "needs a C++ compiler and on GPUs triton. Or leave torch_compile out."
                ) from error

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return super().device if self._constructed or self.deepspeed else torch.device("cpu")

    @cached_property
    def distributed_state(self) -> PartialState | None:
        """accelerate's state, which ranks and world size are read from; `_setup_devices` assigns it."""
        self.start_process_group()
        state: PartialState | None = vars(self)["distributed_state"]
        return state

    @cached_property
    def _setup_devices(self) -> torch.device:
        backend = self.ddp_backend or ("gloo" if self.use_cpu else None)
        require_backend(self.ddp_backend, self.use_cpu)
        start_group(backend, self.ddp_timeout_delta)
        given = self.ddp_backend
        if not dist.is_initialized() and not LAUNCHED & os.environ.keys():
            self.ddp_backend = None  # of one process; accelerate would take it for a group's
        device: torch.device = TrainingArguments._setup_devices.func(self)  # type: ignore[attr-defined]
        self.ddp_backend = given
        if self._n_gpu > 1:  # the Trainer would wrap the model in nn.DataParallel, which splits the masks of a batch
            logger.warning(one_of_several_gpus(self._n_gpu, sys.argv[1:]))
            self._n_gpu = 1
        leave_at_exit()
        return device

    @property
    def resume(self) -> bool | str:
        """Where the run continues, as `resume_of` describes it."""
        return resume_of(self.resume_from_checkpoint)

    def for_trainer(self) -> "TrainArguments":
        """A copy for the Trainer with push_to_hub off: it would upload all of output_dir; `hub.upload.push` does it.

        The run's name for loggers defaults to the name of its folder, so that a resumed run continues under that name.
        """
        arguments = copy(self)
        arguments.push_to_hub = False
        if self.max_minutes is not None:
            arguments.max_steps = UNKNOWN
        arguments.run_name = self.run_name or Path(self.output_dir or ".").resolve().name
        return arguments

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As in transformers, but below the length of the run: the polynomial schedule divides by the difference."""
        steps = int(super().get_warmup_steps(num_training_steps))
        return max(0, min(steps, num_training_steps - 1))

    def schedule_kwargs(self, num_training_steps: int) -> dict[str, Any] | None:
        """`lr_scheduler_kwargs` as transformers takes them for a run of that length: fractions become whole steps."""
        given = self.lr_scheduler_kwargs if isinstance(self.lr_scheduler_kwargs, dict) else {}
        if self.lr_scheduler_type in BY_FIGURES:
            given = {"mode": "max" if self.greater_is_better else "min", **given}
        counts = steps_of_schedule(given)
        whole = {name: round(count if count >= 1 else count * num_training_steps) for name, count in counts.items()}
        return {**given, **whole} or None

    def _continues(self) -> bool:
        """Whether a checkpoint is resumed, or may be: `auto` resumes one where `output_dir` has any."""
        resume = resume_of(self.resume_from_checkpoint)
        return any(Path(self.output_dir or ".").glob("checkpoint-*")) if resume == "auto" else resume is not False

    def _require_length(self) -> None:
        """A run makes at least one step: the Trainer would end without one, and save an untrained model."""
        epochs = vars(self)["num_train_epochs"]
        if self.max_steps == 0 or self.max_steps < -1 or (isinstance(epochs, int | float) and epochs <= 0):
            raise RecipeError(
                f"max_steps={self.max_steps}, num_train_epochs={epochs}: expected a run of at least one step. Give "
                "num_train_epochs above 0, and max_steps of at least 1, or -1 to train by epochs."
            )

    def _require_metric(self) -> None:
        """transformers would take the loss, which evaluations do not compute."""
        needing = {
            "early_stopping_patience": self.early_stopping_patience is not None,
            "load_best_model_at_end": self.load_best_model_at_end,
            f"lr_scheduler_type={self.lr_scheduler_type}": self.lr_scheduler_type in BY_FIGURES,
        }
        found = [name for name, needs in needing.items() if needs]
        if self.metric_for_best_model is None and found:
            raise RecipeError(
                f"metric_for_best_model=null: expected a metric for {' and '.join(found)}. Give one, such as eval_map, "
                "or leave these out (load_best_model_at_end false)."
            )

    def _follow_launcher(self) -> None:
        """Take the precision from `accelerate launch`, which passes its options and its file by the environment.

        `bf16` or `fp16` of the recipe win. Otherwise accelerate would follow the environment whatever the recipe says,
        so what contradicts the recipe is refused.
        """
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if self.bf16 is None and not self.fp16 and asked in ("bf16", "fp16"):
            self.bf16, self.fp16 = asked == "bf16", asked == "fp16"
        if asked != "no" and not self.bf16 and not self.fp16:
            raise RecipeError(
                f"ACCELERATE_MIXED_PRECISION={asked}, as accelerate launch or its file sets it, contradicts the "
                "recipe, which trains in float32. Leave it out there, or set bf16 or fp16 in the recipe (when a run is "
                "resumed, with --allow_changes true)."
            )
        for variable, field in LAUNCHER_ENGINES.items():
            if os.environ.get(variable, "false").lower() in ("true", "1") and not vars(self)[field]:
                raise RecipeError(
                    f"{variable} is set by accelerate launch or its file, but the recipe has no {field}. Leave it out "
                    f"there, and give {field} in the recipe, whose settings are checked."
                )
        backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if backend.lower() != "no":
            raise RecipeError(
                f"ACCELERATE_DYNAMO_BACKEND={backend}, as accelerate launch or its file sets it, would compile the "
                "losses for each number of objects. Leave it out there, and set torch_compile in the recipe."
            )

    def _require_fractions(self) -> None:
        """A run of minutes has no known number of steps to count in."""
        if self.max_steps > 0:
            raise RecipeError(f"max_minutes and max_steps={self.max_steps} both set the length of the run: keep one.")
        counts = {name: vars(self)[name] for name in ("warmup_steps", "head_first_steps")}
        for name, count in {**counts, **steps_of_schedule(self.lr_scheduler_kwargs)}.items():
            if count >= 1:
                raise RecipeError(
                    f"{name}={count:g}: expected a fraction of the run, below 1, since the number of steps "
                    "in max_minutes is not known."
                )
        if self.logging_steps < 1:
            raise RecipeError(
                f"logging_steps={self.logging_steps:g}: expected a number of steps of at least 1, since the number of "
                "steps in max_minutes is not known."
            )
        if self.lr_scheduler_type in BY_FIGURES:
            raise RecipeError(
                f"lr_scheduler_type={self.lr_scheduler_type} follows the figures of evaluations, but with max_minutes "
                "the learning rate follows the time. Leave one of them out."
            )

    def _optimizer(self) -> str:
        """The optimizer of the recipe, or the default."""
        sharded = self.fsdp or self.deepspeed
        if sharded and self.optim == MUON:
            raise RecipeError(
                "optim=muon orthogonalises whole matrices, but fsdp and deepspeed give each process a part of them. "
                "Set optim adamw_torch_fused (a saved recipe names the optimizer of its run), or leave fsdp and "
                "deepspeed out."
            )
        return self.optim or ("adamw_torch_fused" if sharded else MUON)

    def _resolve_schedule(self) -> None:
        """Fill in the schedule's defaults, and translate `step`, which transformers lacks."""
        if self.lr_scheduler_type == "step":
            self.lr_scheduler_type = "constant_with_warmup"
            self.lr_milestones = list(STEP_MILESTONES) if self.lr_milestones is None else self.lr_milestones
        if self.lr_scheduler_kwargs in SCHEDULE_DEFAULTS.values():
            self.lr_scheduler_kwargs = None  # a saved recipe holds the defaults of the schedule it was saved with
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type in SCHEDULE_DEFAULTS:
            self.lr_scheduler_kwargs = dict(SCHEDULE_DEFAULTS[self.lr_scheduler_type])
        require_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs, vars(self)["learning_rate"])
        self._require_own_factors()
        if not all(0 < share < 1 for share in self.lr_milestones or ()):
            raise RecipeError(
                f"lr_milestones: expected fractions of the run, between 0 and 1, got {self.lr_milestones}."
            )

    def _require_own_factors(self) -> None:
        """The schedules that follow the figures have no factor by step, so these fields would have no effect."""
        unused: dict[str, tuple[object, ...]] = {
            "head_first_steps": (0,),
            "lr_milestones": (None, []),
            "warmup_steps": (0, DEFAULT_WARMUP),
        }
        given = [name for name, without in unused.items() if vars(self)[name] not in without]
        if self.lr_scheduler_type in BY_FIGURES and given:
            raise RecipeError(
                f"lr_scheduler_type={self.lr_scheduler_type} follows the figures of evaluations, so that "
                f"{' and '.join(given)} would have no effect. Leave one of them out."
            )

    def _align_checkpointing(self) -> None:
        """Derive the four saving and evaluation fields; one that was given must agree."""
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


def refuse_unsupported(values: Mapping[str, object], table: Mapping[str, tuple[object, str]], where: str = "") -> None:
    """Raise RecipeError if one of `values` is neither unset nor what the table says that it keeps."""
    for name, (kept, effect) in table.items():
        if values[name] not in (kept, None, []):
            raise RecipeError(f"{name}{where} {effect}: leave it out.")


def default_backbone_multiplier(layer_decay: float | None) -> float:
    """`backbone_lr_multiplier` where none is given."""
    return 0.1 if layer_decay is None else 1.0


def resume_of(named: str | None) -> bool | str:
    """`resume_from_checkpoint` as True (the newest checkpoint), "auto" (it or a fresh run), a folder, or False."""
    words: dict[str, bool | str] = {"none": False, "false": False, "true": True, "auto": "auto"}
    return words.get(str(named).lower(), named or False)


def one_of_several_gpus(count: int, arguments: Sequence[str]) -> str:
    """Hint for a process started without a launcher on several GPUs; `arguments` are those of m2f."""
    command = f"torchrun --nproc_per_node {count} -m m2f_trainer {shlex.join(arguments)}".strip()
    return f"1 of {count} GPUs used. To use all, start with:\n  {command}"


def parse_checkpointing_steps(value: str | int) -> int | str:
    """Return 'epoch', or a number of optimizer steps of at least 1. Raises RecipeError."""
    text = str(value)
    if text == "epoch":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise RecipeError(f'checkpointing_steps: expected a number of steps of at least 1 or "epoch", got {value!r}.')


def steps_of_schedule(settings: object) -> dict[str, float]:
    """The numbers of steps among a schedule's arguments; below 1 they are fractions of the run. Raises RecipeError."""
    given = settings if isinstance(settings, dict) else {}
    counts = {name: given[name] for name in SCHEDULE_STEPS if given.get(name) is not None}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int | float) or count < 0:
            raise RecipeError(
                f"lr_scheduler_kwargs: {name}={count!r}: expected a number of steps, or a fraction of the run below 1."
            )
    return counts


def require_schedule(name: str, settings: object, rate: float | str) -> None:
    """Raise RecipeError if transformers can't build the schedule from these arguments and the learning rate."""
    steps_of_schedule(settings)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0 if isinstance(rate, str) else rate)
    try:
        get_scheduler(name, optimizer, 1, 2, settings if isinstance(settings, dict) else None)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"lr_scheduler_type {name} with lr_scheduler_kwargs {settings}: {error}.") from error


def require_known_loggers(names: Sequence[str]) -> None:
    """Raise RecipeError if transformers has no logger of one of these names."""
    known = ["none", "all", *loggers.INTEGRATION_TO_CALLBACK]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise RecipeError(
                f"report_to={name}: unknown logger; the nearest is {nearest}. Known: {', '.join(sorted(known))}."
            )


def require_backend(name: str | None, on_cpu: bool) -> None:
    """Raise RecipeError if processes can't communicate by this backend here; None chooses one by the device."""
    suitable = {"gloo": True, "mpi": True, "nccl": not on_cpu, "xccl": not on_cpu}
    there = [one for one, suits in suitable.items() if suits and dist.is_backend_available(one)]
    if name is not None and name not in there and (on_cpu or name in suitable):
        raise RecipeError(
            f"ddp_backend={name}: not available {'on CPUs' if on_cpu else 'in this installation of torch'}; available: "
            f"{', '.join(there)}. Leave ddp_backend out: it is chosen by the device."
        )


def require_optimizer(arguments: TrainingArguments, name: str) -> None:
    """Raise RecipeError if the optimizer needs a package that isn't installed: it would fail after the data is read."""
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise RecipeError(f"optim={name}: {error}. Or leave optim out.") from error
    except ValueError as error:  # of others: they need the model, which is built later
        if "install" in str(error) or "import" in str(error):
            raise RecipeError(f"optim={name}: {error}. Or leave optim out.") from error
