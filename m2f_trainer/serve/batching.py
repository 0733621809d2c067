"""Concurrent requests in batches: one thread runs the model on the images that wait in a queue."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from m2f_trainer.errors import M2FError
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Frame, Predictor
from m2f_trainer.serve.answers import NAME

logger = logging.getLogger(__name__)

Threshold: TypeAlias = float | Literal["auto"]
"""The minimum score of an instance; "auto": the model's own threshold of each class."""


@dataclass(frozen=True, eq=False)
class Job:
    """An image file or its `whole_frame`, and where its instances, or the error, are delivered."""

    image: bytes | Frame
    threshold: Threshold
    future: Future[Instances] = field(default_factory=Future)

    def deliver(self, result: Instances | Exception) -> None:
        """Set the result or the error of the future, unless it is done or cancelled."""
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class _GivenUpError(Exception):
    """Nobody waits for the images that are being predicted."""


class Batcher:
    """Predict images that arrive one by one in batches, in one thread.

    A batch is predicted as soon as `batch_size` images wait, or `max_wait` seconds after its first image arrived.
    Images with different thresholds are predicted apart, because `Predictor.stream` takes one. An image whose future is
    cancelled is given up, between two batches of tiles if they are being predicted.

    Args:
        predictor: no other thread may predict with it until `close` returns.
        batch_size: most images, or tiles, in memory of the model.
        max_wait: seconds.
        observe: called with the number of images of each batch.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        batch_size: int,
        max_wait: float,
        observe: Callable[[int], object] = lambda size: None,
    ) -> None:
        self.predictor, self.batch_size, self.max_wait, self._observe = predictor, batch_size, max_wait, observe
        self.seconds_per_image = 0.0
        """Of the last batch."""
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, image: bytes | Frame, threshold: Threshold) -> Future[Instances]:
        """The instances of an image file, or of its `whole_frame`, later.

        The future raises an M2FError for a file that can't be used.
        """
        job = Job(image, threshold)
        self._jobs.put(job)
        return job.future

    @property
    def waiting(self) -> int:
        """The number of images in the queue."""
        return self._jobs.qsize()

    @property
    def alive(self) -> bool:
        """Whether images are predicted."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Predict the images in the queue, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            batch, closing = self._next_batch()
            started = time.perf_counter()
            by_threshold: dict[Threshold, list[Job]] = {}
            for job in batch:
                if not job.future.cancelled():
                    by_threshold.setdefault(job.threshold, []).append(job)
            for jobs in by_threshold.values():
                self._observe(len(jobs))
                self._predict(jobs)
            if batch:
                self.seconds_per_image = (time.perf_counter() - started) / len(batch)

    def _next_batch(self) -> tuple[list[Job], bool]:
        """The next images, after waiting for the first one, and whether `close` was called after them."""
        first = self._jobs.get()
        if first is None:
            return [], True
        batch, latest = [first], time.monotonic() + self.max_wait
        while len(batch) < self.batch_size:
            try:
                job = self._jobs.get(timeout=max(0.0, latest - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False

    def _predict(self, jobs: Sequence[Job]) -> None:
        """Deliver the instances, or the error, of each image; all have one threshold."""
        try:
            self._stream(jobs)
        except _GivenUpError:
            if left := [job for job in jobs if not job.future.done()]:
                self._predict(left)
        except Exception as error:  # the thread lives on: the next batch may fit in memory
            logger.exception("A batch of %d image(s) failed.", len(jobs))
            for job in jobs:
                job.deliver(error)

    def _stream(self, jobs: Sequence[Job]) -> None:
        """As `_predict`.

        Raises:
            _GivenUpError: before a batch of the model, if an image was cancelled and nobody waits for another that was
                read so far
        """
        read: list[Job] = []

        def images() -> Iterator[bytes | Frame]:
            for job in jobs:
                read.append(job)
                yield job.image

        def fail(position: int, error: M2FError) -> None:
            jobs[position].deliver(type(error)(str(error).replace(f"image {position}:", f"{NAME}:", 1)))

        def check(*_: object) -> None:
            if any(job.future.cancelled() for job in read) and all(job.future.done() for job in read):
                raise _GivenUpError

        hook = self.predictor.model.register_forward_pre_hook(check)
        try:
            for instances in self.predictor.stream(
                images(), batch_size=self.batch_size, threshold=jobs[0].threshold, unreadable=fail
            ):
                jobs[instances.image_id].deliver(instances)
        finally:
            hook.remove()
