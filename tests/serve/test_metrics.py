"""Counters in the text format of Prometheus."""

import pytest

pytest.importorskip("prometheus_client", reason="the server needs it: pip install 'm2f-trainer[serve]'")

from m2f_trainer.serve.metrics import Metrics


def test_what_was_counted_is_in_the_text() -> None:
    metrics = Metrics()
    metrics.count("/instances", 200, 0.3)
    metrics.count("/instances", 503, 0.001)
    metrics.count_batch(3)
    metrics.watch(lambda: 7, lambda: 9)
    lines = metrics.text().decode().splitlines()
    for line in (
        'm2f_requests_total{path="/instances",status="503"} 1.0',
        'm2f_request_seconds_bucket{le="0.25",path="/instances"} 1.0',
        'm2f_request_seconds_bucket{le="0.5",path="/instances"} 2.0',
        'm2f_batch_images_bucket{le="2.0"} 0.0',
        'm2f_batch_images_bucket{le="4.0"} 1.0',
        "m2f_queue_images 7.0",
        "m2f_open_requests 9.0",
    ):
        assert line in lines


def test_two_servers_in_one_process_count_apart() -> None:
    Metrics().count("/instances", 200, 0.1)
    assert "m2f_requests_total{" not in Metrics().text().decode()
