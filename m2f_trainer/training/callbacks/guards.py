"""Stop a run when a loss or gradient is not finite, before it changes the weights."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2f_trainer.distributed import any_rank, full_tensor
from m2f_trainer.errors import TrainingError
from m2f_trainer.run_folder import write_json

logger = logging.getLogger(__name__)


class FiniteGuard(TrainerCallback):
    """Raises TrainingError before an update that is not finite, so weights and checkpoints stay unchanged.

    Args:
        batches: returns the micro-batches of the current step
        loss: returns the loss summed since the last log
        norm: returns the norm of this step's gradients, before clipping; None where an engine keeps them to itself
        scaled: whether a float16 gradient scaler is in use, which skips steps with gradients that are not finite
    """

    def __init__(
        self,
        batches: Callable[[], Sequence[Mapping[str, Any]]],
        loss: Callable[[], Tensor],
        norm: Callable[[], Tensor | None],
        scaled: bool,
    ) -> None:
        self.batches, self.loss, self.norm, self.scaled = batches, loss, norm, scaled

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the loss, and the gradients unless a float16 scaler does that."""
        total, norm = self.loss().detach(), self.norm()
        if norm is not None and not self.scaled:
            total = total + full_tensor(norm).to(total)
        if any_rank(~torch.isfinite(total), total.device):
            raise TrainingError(self._report(model, Path(str(args.output_dir)), state, args))

    def _report(self, model: nn.Module, output: Path, state: TrainerState, args: TrainingArguments) -> str:
        step, rank = state.global_step + 1, args.process_index
        folder = output / f"not-finite-step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, batch in enumerate(self.batches()):
            write_batch(batch, folder / f"batch-{rank}-{number}.safetensors")
        images = sorted(gather_object([image for batch in self.batches() for image in batch["image_id"].tolist()]))
        found = {name: p.grad.isfinite().all() for name, p in model.named_parameters() if p.grad is not None}
        gradients = [name for name, finite in found.items() if not full_tensor(finite)]
        weights = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
        if rank == 0:
            described = {"step": step, "seed": args.seed, "image_ids": images, "gradients_not_finite": gradients}
            write_json(folder / "report.json", described)
            if all(tensor.isfinite().all() for tensor in weights.values()):
                model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        what = "loss" if not torch.isfinite(self.loss()) else "gradient"
        return (
            f"step {step}: the {what} is not finite. The step's images are {', '.join(map(str, images))}; they, the "
            f"weights before the step and a report are in {folder}. Look at these images and their annotations; "
            "or resume from an earlier checkpoint with a lower learning_rate or without fp16"
        )


def write_batch(batch: Mapping[str, Any], path: Path) -> None:
    """Write a collated batch's tensors; `read_batch` is the inverse."""
    flat: dict[str, Tensor] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            flat[key] = value
        else:
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            flat |= {f"{key}.{part}": tensor for part, tensor in parts}
    save_file({key: tensor.contiguous() for key, tensor in flat.items()}, path)


def read_batch(path: Path) -> dict[str, Any]:
    """Read what `write_batch` wrote: a batch as `collate` makes it, for `model(**batch)`."""
    batch: dict[str, Any] = {}
    for key, tensor in load_file(path).items():
        name, _, part = key.partition(".")
        if part:
            batch.setdefault(name, {})[part] = tensor
        else:
            batch[name] = tensor
    labels = batch.get("class_labels", {})
    return {**batch, "class_labels": [labels[str(image)] for image in range(len(labels))]}
