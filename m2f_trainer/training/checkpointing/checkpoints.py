"""Checkpoints that are complete or absent, and the lock of a run's folder.

A checkpoint is written into a staging folder. Its manifest (size and SHA-256 of every file) is written last, everything
is synced to the disk, and only then is the folder renamed to `checkpoint-N`. A process killed at any moment therefore
leaves earlier checkpoints unchanged, and later damage is detected by the manifest before a checkpoint is loaded.

The order of this file: the manifest, writing (`staged`), rotation, checks before writing, the lock.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from errno import EACCES, EAGAIN
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from torch.nn import Parameter
from transformers import Trainer, TrainerState

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.distributed import any_rank, full_tensor
from m2f_trainer.errors import TrainingError
from m2f_trainer.run_folder import LOCK, MANIFEST, METRICS, STAGING, STATE, check_no_links

logger = logging.getLogger(__name__)


def checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """All `checkpoint-N` folders with their steps, lowest step first; they are not checked for completeness."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), folder))
    return sorted(found)


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder's files, and sync all of them to the disk; the manifest comes last."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest(path)}
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(_manifest_text(files), encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _manifest_text(files: Mapping[str, Any]) -> str:
    return json.dumps({"version": 1, "files": files}, indent=2) + "\n"


def damage(folder: Path) -> str | None:
    """A description of a checkpoint's damage, with the file's name; None if it is intact."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        whole = bool(files) and text == _manifest_text(files)
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the checkpoint was not completed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if not whole:
        return f"{MANIFEST} differs from what was written"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("size"):
            return f"{name} has {path.stat().st_size} bytes instead of {entry.get('size')}"
        if digest(path) != entry.get("sha256"):
            return f"{name} differs from what was written (SHA-256)"
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged(trainer: Trainer) -> Iterator[Path]:
    """Within the block the Trainer writes its checkpoint into a staging folder, which is then completed and renamed.

    Yields that folder, so that more files can be added. All ranks must call this. Raises TrainingError when a weight is
    not finite or the disk is too full; earlier checkpoints are kept.
    """
    args, step = trainer.args, trainer.state.global_step
    output = Path(str(args.output_dir))
    staging = output / STAGING
    require_finite(trainer)
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
        require_space(output, expected_size(trainer))
    trainer.accelerator.wait_for_everyone()
    args.output_dir = str(staging)
    try:
        yield staging / f"checkpoint-{step}"
        args.output_dir = str(output)
        trainer.accelerator.wait_for_everyone()
        _point_at_best(trainer.state, output / f"checkpoint-{step}")
        if args.should_save:
            _complete(trainer, staging / f"checkpoint-{step}", output / f"checkpoint-{step}")
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingError(
            f"checkpoint {step} could not be written ({error}): {_free_space(output)}. Earlier checkpoints are "
            "unchanged: free some space, or lower save_total_limit, and run again with --resume_from_checkpoint true"
        ) from error
    finally:
        args.output_dir = str(output)
    trainer.accelerator.wait_for_everyone()


def _point_at_best(state: TrainerState, final: Path) -> None:
    """Set the best checkpoint's path to its final one, on every rank: the Trainer recorded the staging folder."""
    best = final.with_name(f"checkpoint-{state.best_global_step}")
    if best == final or best.is_dir():  # otherwise it is in the folder that the run was resumed from
        state.best_model_checkpoint = str(best)


def _complete(trainer: Trainer, written: Path, final: Path) -> None:
    """Write state and manifest, and rename the folder."""
    state = trainer.state
    state.save_to_json(str(written / STATE))
    write_manifest(written)
    if final.exists():
        _remove(final)
    written.rename(final)
    _sync(final.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def figures_of_step(latest: Mapping[str, float], step: int) -> Mapping[str, float]:
    """The content of a checkpoint's metrics.json: the figures of that step, or a note that it was not evaluated.

    The note is written when a signal stops a run, because a scheduler does not wait for an evaluation. If one was due
    at that step, it is made when the run is resumed (`resume.OwedEvaluation`). Otherwise the checkpoint only serves to
    resume the run: an evaluation would be added to those that choose the best model and stop early, and the resumed
    run would differ from the uninterrupted one.
    """
    return latest if latest.get("step") == step else {"step": step, "evaluated": False}


def was_evaluated(folder: Path) -> bool:
    """Whether a checkpoint holds figures; false for one that was saved when a signal stopped the run."""
    try:
        return json.loads((folder / METRICS).read_text(encoding="utf-8")).get("evaluated") is not False
    except (OSError, ValueError, AttributeError):
        return True  # `damage` reports an unreadable file


def rotate(
    output_dir: Path, limit: int | None, best_step: int | None, newest_step: int, in_use: Container[int] = ()
) -> None:
    """Keep the newest checkpoint, the best one, and the newest complete others up to `limit`; delete older ones.

    Those of the steps `in_use` are kept, too, until a later call.

    Age is determined by the step, never by file times. Checkpoints of steps beyond `newest_step` belong to another
    branch of the run (it was resumed from an earlier checkpoint) and are not touched. A checkpoint that was not
    evaluated does not count towards the limit, and is deleted at the next save.
    """
    if not limit or limit < 0:
        return
    older = [(step, folder) for step, folder in checkpoints(output_dir) if step < newest_step]
    kept = {step for step, _ in older if step == best_step}
    if was_evaluated(output_dir / f"checkpoint-{newest_step}"):
        kept.add(newest_step)
    for step, folder in reversed(older):
        if len(kept) < limit and (folder / MANIFEST).is_file() and was_evaluated(folder):
            kept.add(step)
    for step, folder in older:
        if step not in kept and step not in in_use:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a partly deleted folder is not taken for a checkpoint."""
    doomed = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def require_finite(trainer: Trainer) -> None:
    """Raise TrainingError on all ranks when a weight of any rank is NaN or infinite."""
    model: Any = trainer.model
    parameters: dict[str, Parameter] = dict(model.named_parameters())
    finite = torch.stack([full_tensor(torch.isfinite(one.detach()).all()) for one in parameters.values()])
    if any_rank(~finite.all(), finite.device):
        broken = [name for name, good in zip(parameters, finite.tolist(), strict=True) if not good]
        named = f"{broken[0]} and {len(broken) - 1} other parameters" if broken else "parameters of another rank"
        raise TrainingError(
            f"step {trainer.state.global_step}: {named} are no longer finite, so no checkpoint is written. Resume "
            "with --resume_from_checkpoint true and a lower learning_rate"
        )


def expected_size(trainer: Trainer) -> int:
    """Size of a checkpoint in bytes: weights, two moments for each trained weight, and the average if one is kept.

    FSDP and DeepSpeed write the weights a second time for resuming, and DeepSpeed the trained ones a third time.
    """
    model: Any = trainer.model
    parameters: list[Parameter] = list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    weights *= 2 if trainer.args.fsdp or trainer.args.deepspeed else 1
    averaged = isinstance(trainer.args, TrainArguments) and trainer.args.ema_decay is not None
    slots = 2 + int(averaged) + int(bool(trainer.args.deepspeed))
    moments = sum(
        slots * parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad
    )
    return weights + (0 if trainer.args.save_only_model else moments)


def require_space(folder: Path, need: int) -> None:
    """Raise TrainingError unless `need` bytes plus a margin are free."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < need * 1.02 + 2**20:
        raise TrainingError(
            f"disk full: a checkpoint needs {need / 1e6:.0f} MB, and {_free_space(folder)}. Free some space, or lower "
            "save_total_limit, and run again with --resume_from_checkpoint true"
        )


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free in {folder}"


@contextmanager
def run_lock(output_dir: Path, held: bool = True) -> Iterator[None]:
    """Lock an output folder for this process; the main process of a run does so for all (`held` is false elsewhere).

    Raises TrainingError at once when another process holds it, and ModelFolderError where a file of the folder is a
    link, see `check_no_links`. The kernel keeps the lock (a POSIX record lock) and releases it when the process ends,
    in whatever way; data workers do not inherit it. The file's content only names the holder, so a file left behind
    does no harm.
    """
    if not held:
        yield
        return
    check_no_links(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK).open("a+", encoding="utf-8") as file:
        _acquire(file, output_dir)
        former = _lock_holder(file)
        if former is not None:
            logger.warning("%s: took over the lock of a run that has ended (%s)", output_dir, former)
        _replace_content(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        try:
            yield
        finally:
            _replace_content(file, "")


def _acquire(file: TextIO, output_dir: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (EACCES, EAGAIN):
            logger.warning("%s: this file system has no locks (%s), so a second run is not detected", output_dir, error)
            return
        raise TrainingError(
            f"{output_dir} is in use by another run ({_lock_holder(file) or 'just starting'}). Wait for it, stop "
            "it, or give another output_dir"
        ) from error


def _replace_content(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _lock_holder(file: TextIO) -> str | None:
    """The process that wrote the lock file, None if empty. Opening it again and closing it would release the lock."""
    file.seek(0)
    text = file.read()
    try:
        content = json.loads(text)
        return f"process {content['pid']} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return text.strip() or None
