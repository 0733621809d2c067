"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("m2f_requests", "Answered requests.", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            "m2f_request_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "m2f_batch_images", "Images in a batch of the model.", buckets=SIZES, registry=self._registry
        )
        self._waiting = Gauge("m2f_queue_images", "Images that wait for the model.", registry=self._registry)
        self._open = Gauge(
            "m2f_open_requests", "Requests with images that are being received or answered.", registry=self._registry
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def count_batch(self, images: int) -> None:
        """Count a batch of the model."""
        self._batches.observe(images)

    def watch(self, waiting: Callable[[], int], opened: Callable[[], int]) -> None:
        """Read the length of the queue and the number of open requests from these functions."""
        self._waiting.set_function(waiting)
        self._open.set_function(opened)

    def text(self) -> bytes:
        """All counters in Prometheus' text format."""
        return generate_latest(self._registry)
