"""Tiny runs of `train`, each in its own process that can be killed.

The processes are forked from a server process that has imported everything and done nothing else. So they start quickly
and inherit no thread or lock from the process of the tests.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from m2f_trainer.cli.main import main
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.training import run
from tests.model.tiny import VIT

HEAD = {
    "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 2, "train_num_points": 64,
}  # fmt: skip
BASE: dict[str, Any] = {
    "backbone_config": VIT, "head_config": HEAD, "tune": "full", "num_queries": 7, "image_height": 64,
    "image_width": 64, "max_steps": 6, "per_device_train_batch_size": 2, "checkpointing_steps": 2, "logging_steps": 1,
    "dataloader_num_workers": 0, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "color_jitter": 0.2,
    "load_best_model_at_end": False, "learning_rate": 1e-3, "save_total_limit": None, "max_eval_samples": 2,
}  # fmt: skip
CANARY = "hf_canaryCANARYcanaryCANARYcanary00"  # a Hub token that must appear in no file or log
Prepare = Callable[[], object]  # called first in the process; picklable
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.tiny"])


def dataset(folder: Path, images: int = 7) -> Path:
    """A small dataset; an odd number of images, so that an epoch ends with half a batch."""
    return write_sample(folder / "data", images=(images, 2, 0))


def options(data: Path, output: Path, **fields: Any) -> list[str]:
    """Write a recipe, and return the arguments of `m2f` that train it."""
    recipe = output.with_name(f"{output.name}.json")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps({**BASE, "dataset_name": str(data), "output_dir": str(output), **fields}))
    return ["train", str(recipe)]


@dataclass
class Ran:
    """The exit status of a process (negative for a signal, None if it hung) and its output."""

    status: int | None
    text: str


class Started:
    """`m2f train` in its own process, or in one for each rank."""

    def __init__(
        self, log: Path, arguments: Sequence[str], prepare: Prepare | None = None, ranks: int = 1, **environment: str
    ) -> None:
        self.log = log
        for former in log.parent.glob(f"{log.name}.?"):
            former.unlink()
        port = 20000 + (os.getpid() * 7 + int(time.monotonic() * 1000)) % 20000
        self.processes = [
            CONTEXT.Process(
                target=_child, args=(log, list(arguments), prepare, {**environment, **_rank(rank, ranks, port)})
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, text: str, timeout: float = 240) -> None:
        """Wait until the text is in the log."""
        end = time.monotonic() + timeout
        while text not in self.text() and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < end, self.text()[-3000:]
            time.sleep(0.01)

    def text(self) -> str:
        return "".join(path.read_text() for path in sorted(self.log.parent.glob(f"{self.log.name}*")))

    def signal(self, number: int, rank: int = 0) -> None:
        pid = self.processes[rank].pid
        assert pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def join(self, timeout: float = 240) -> list[Ran]:
        """Wait for all ranks; a rank that hangs is killed and has the status None."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process.is_alive() for process in self.processes]
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        return [
            Ran(None if late else process.exitcode, self.text())
            for late, process in zip(hung, self.processes, strict=True)
        ]


def train(
    log: Path, arguments: Sequence[str], prepare: Prepare | None = None, timeout: float = 240, **environment: str
) -> Ran:
    """One run from start to end."""
    return Started(log, arguments, prepare, **environment).join(timeout)[0]


def _rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives to a rank; a single process gets nothing."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def _child(log: Path, arguments: list[str], prepare: Prepare | None, environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for data workers: it came with the server's
    os.environ |= environment
    file = os.open(f"{log}.{environment.get('RANK', '0')}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = open(file, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    os.setpgrp()
    warnings.simplefilter("default")
    logging.basicConfig(force=True, stream=sys.stderr, format="%(message)s")
    status = 1
    try:
        if prepare is not None:
            prepare()
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def at_step(step: int, act: Callable[[], object], event: str = "on_step_begin") -> None:
    """Make runs of this process call `act` at an event, once `step` steps are done."""
    from transformers import TrainerCallback

    class Act(TrainerCallback):
        done = False

    def happen(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= step and not Act.done:
            Act.done = True
            act()

    setattr(Act, event, happen)
    usual = run.run_callbacks
    run.run_callbacks = lambda args: [Act(), *usual(args)]  # type: ignore[assignment]


def losses(output: Path) -> dict[int, float]:
    """Loss by step, from the run's own log."""
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def same_weights(first: Path, second: Path) -> bool:
    """Whether two model folders hold the same bits."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_self(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
