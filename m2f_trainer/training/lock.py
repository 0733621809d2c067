"""One run per folder."""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from errno import EACCES, EAGAIN
from pathlib import Path
from typing import TextIO

from m2f_trainer.errors import TrainingError
from m2f_trainer.train_arguments import TrainArguments

logger = logging.getLogger(__name__)
LOCK = ".lock"


def only_run(arguments: TrainArguments) -> AbstractContextManager[None]:
    """Hold the output folder: the first process does for all of a run."""
    return run_lock(Path(arguments.output_dir or ".")) if arguments.process_index == 0 else nullcontext()


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises TrainingError at once when another one holds it.

    The kernel keeps the lock (a POSIX record lock) and drops it with the process, however that ends; data workers don't
    inherit it. The file's content only tells who holds it, so that a stale one needs no cure.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK).open("a+", encoding="utf-8") as file:
        _take(file, output_dir)
        former = _holder(file)
        if former is not None:
            logger.warning("%s: took over from a run that is gone (%s)", output_dir, former)
        _write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        try:
            yield
        finally:
            _write(file, "")


def _take(file: TextIO, output_dir: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (EACCES, EAGAIN):
            logger.warning("%s: no locks here (%s), so a second run would not be noticed", output_dir, error)
            return
        raise TrainingError(
            f"{output_dir} is in use by another run ({_holder(file) or 'just starting'}). Wait for it, stop it, or "
            "give another output_dir"
        ) from error


def _write(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _holder(file: TextIO) -> str | None:
    """Who wrote the lock file; None when it is empty. It isn't opened again: closing it would drop the lock."""
    file.seek(0)
    text = file.read()
    try:
        content = json.loads(text)
        return f"process {content['pid']} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return text.strip() or None
