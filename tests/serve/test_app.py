"""The server answers images with what the predictor finds, and everything else with a status and a reason."""

from __future__ import annotations

import html
import http.client
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from m2f_trainer.data import transforms
from m2f_trainer.data.tiles import Tiling
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.masks.segmentation import decode, to_counts
from tests.model.tiny import tiny_model
from tests.serve.loopback import ask, brightness, form, picture, running


@pytest.fixture(scope="module")
def tiny() -> Predictor:
    """A predictor with a random model."""
    return Predictor(tiny_model())


@pytest.fixture(scope="module")
def port(tiny: Predictor) -> Iterator[int]:
    """The port of its server."""
    with running(tiny) as number:
        yield number


def expected(predictor: Predictor, image: bytes, **options: Any) -> list[dict[str, Any]]:
    return predictor(image, **options)[0].to_coco()


def test_an_image_as_body_or_form_is_answered_with_coco_results(port: int, tiny: Predictor) -> None:
    image = picture()
    truth = expected(tiny, image, threshold=0.0)
    assert len(truth) > 3
    body, headers = form(image)
    for answer in (ask(port, "POST", "/instances", image), ask(port, "POST", "/instances", body, headers)):
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "application/json"
        assert answer.json == truth
    numbered = ask(port, "POST", "/instances?image_id=42", image).json
    assert numbered == [{**entry, "image_id": 42} for entry in truth]


def test_a_request_sets_its_own_threshold(port: int, tiny: Predictor) -> None:
    image = picture()
    middle = float(np.median([entry["score"] for entry in expected(tiny, image, threshold=0.0)]))
    answer = ask(port, "POST", f"/instances?threshold={middle}", image)
    assert answer.json == expected(tiny, image, threshold=middle)
    assert ask(port, "POST", "/instances?threshold=auto", image).json == expected(tiny, image)


def test_polygons_outline_the_masks(port: int, tiny: Predictor) -> None:
    image = picture()
    answer = ask(port, "POST", "/instances?format=polygons", image).json
    assert (answer["width"], answer["height"]) == (60, 80)
    for entry, truth in zip(answer["instances"], expected(tiny, image, threshold=0.0), strict=True):
        assert (entry["category_id"], entry["score"]) == (truth["category_id"], truth["score"])
        assert entry["category"] == {3: "cat", 17: "dog"}[truth["category_id"]]
        mask = decode(truth["segmentation"]["counts"], 80, 60)
        filled = decode(to_counts(entry["polygons"], 80, 60, "answer"), 80, 60)
        assert not (mask & (1 - filled)).any()  # holes are filled
        assert entry["area"] == coco_mask.area(truth["segmentation"])


def test_an_overlay_is_the_picture_with_its_instances() -> None:
    image = picture()
    with running(brightness()) as port:
        answer = ask(port, "POST", "/instances?format=overlay&threshold=0.5", image)
    assert answer.headers["content-type"] == "image/jpeg"
    drawn = np.asarray(Image.open(io.BytesIO(answer.body))).astype(int)[:80]
    assert drawn.shape == (80, 60, 3)
    assert np.ptp(drawn[40, 25]) > 60  # white is tinted
    assert drawn[5, 5].max() < 20


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (b"no picture", {}, "the image: not an image of a known format: it starts with b'no pictu'"),
        (b"", {}, "the image: not an image of a known format: the file is empty"),
        (picture()[:120], {}, "the image: the image data is damaged"),
        (*form(b"ab"), "the image: not an image of a known format: it starts with b'ab'"),
        (*form(picture(), file_name=None), "Expected a form with a file, got none"),
        (form(picture())[0][:40], form(b"")[1], "Expected a form with a file, got none"),
        (b"ab", form(b"")[1], "Expected a form (multipart/form-data) with one file: "),
        (b"ab", {"Content-Type": "multipart/form-data"}, "one file: Missing boundary in multipart."),
    ],
    ids=["text", "nothing", "cut", "text in form", "no file", "cut form", "no form", "no boundary"],
)
def test_what_is_no_image_is_refused_with_the_reason(
    port: int, body: bytes, headers: dict[str, str], reason: str
) -> None:
    answer = ask(port, "POST", "/instances", body, headers)
    assert answer.status == 400
    assert reason in answer.reason


def test_an_image_that_is_slow_to_decode_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    decode_now, finish = transforms.open_image, threading.Event()

    def slow_if_wide(image: bytes, *arguments: Any, **options: Any) -> Image.Image:
        opened = decode_now(image, *arguments, **options)
        assert opened.width < 200 or finish.wait(20)
        return opened

    monkeypatch.setattr(transforms, "open_image", slow_if_wide)
    with running(brightness(), threshold=0.5) as port, ThreadPoolExecutor(1) as pool:
        wide = pool.submit(ask, port, "POST", "/instances", picture(width=200))
        try:
            answers = [ask(port, "POST", "/instances?format=polygons", picture(left=left)) for left in (0, 10, 20)]
            assert not wide.done()
        finally:
            finish.set()
        assert [answer.json["instances"][0]["bbox"][0] for answer in answers] == pytest.approx([0, 10, 20], abs=3)
        assert wide.result().status == 200


def test_an_image_of_too_many_pixels_is_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F_MAX_PIXELS", "4000")
    answer = ask(port, "POST", "/instances", picture())
    assert answer.status == 400
    assert answer.reason.startswith("the image: expected at most 4,000 pixels, got 60x80 = 4,800.")


def test_an_overlay_of_a_huge_image_is_refused_before_it_is_predicted(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2f_trainer.serve.answers.LARGEST_PICTURE", 4000)
    answer = ask(port, "POST", "/instances?format=overlay", picture())
    assert answer.status == 400
    assert "overlays are drawn of at most 4,000 pixels, got 60x80 = 4,800. Ask for format=coco" in answer.reason
    assert ask(port, "POST", "/instances", picture()).status == 200


def test_an_overlay_of_a_side_that_jpeg_does_not_have_is_refused_and_one_of_the_longest_is_drawn(port: int) -> None:
    answer = ask(port, "POST", "/instances?format=overlay", picture(65_501, 64))
    assert answer.status == 400
    assert "at most 65,500 pixels a side, got 64x65501. Ask for format=coco or format=polygons" in answer.reason
    answer = ask(port, "POST", "/instances?format=overlay", picture(65_500, 64))
    assert Image.open(io.BytesIO(answer.body)).size == (64, 65_500), "the legend has no room"


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(tiny: Predictor) -> None:
    image = picture()
    with running(tiny, max_bytes=len(image)) as port:
        body, headers = form(image)
        refused = [
            ask(port, "POST", "/instances", image + b"1"),
            ask(port, "POST", "/instances", iter([image, b"1"])),
            ask(port, "POST", "/instances", bytes(10**7)),
            ask(port, "POST", "/instances", body, headers),
            ask(port, "POST", "/instances", iter([body]), headers),
        ]
        assert ask(port, "POST", "/instances", image).status == 200
    assert {answer.status for answer in refused} == {413}
    assert refused[0].reason == f"Expected a request of at most {len(image):,} bytes. --max_bytes raises the limit."


def test_a_request_that_does_not_arrive_is_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2f_trainer.serve.app.BODY_SECONDS", 0.1)
    leave = threading.Event()

    def parts() -> Iterator[bytes]:
        yield b"first"
        leave.wait(1)
        yield b"second"

    answer = ask(port, "POST", "/instances", parts())
    assert answer.status == 408
    assert answer.reason == "Expected the whole request within 0.1 s."


def test_too_many_open_requests_are_sent_away_and_the_others_answered() -> None:
    predictor = brightness()
    predictor.model.gate.clear()
    with running(predictor, max_open=3) as port, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, port, "POST", "/instances", picture(left=left)) for left in (0, 10, 20)]
        while b"m2f_open_requests 3.0" not in ask(port, "GET", "/metrics").body:
            pass
        refused = ask(port, "POST", "/instances", picture())
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.reason.startswith("Expected at most 3 open requests. Try again in")
        assert ask(port, "GET", "/health").status == 200
        predictor.model.gate.set()
        assert [answer.result().status for answer in answers] == [200, 200, 200]
        assert ask(port, "POST", "/instances", picture()).status == 200


def test_each_of_many_concurrent_requests_gets_its_own_answer() -> None:
    predictor = brightness()
    places = [left for _ in range(10) for left in (0, 10, 20, 30)]
    truth = {left: expected(predictor, picture(left=left), threshold=0.5) for left in set(places)}
    predictor.model.batches.clear()

    def answer(left: int) -> Any:
        return ask(port, "POST", "/instances?threshold=0.5", picture(left=left)).json

    with running(predictor, max_wait=5.0) as port, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, places)) == [truth[left] for left in places]
        sizes = ask(port, "GET", "/metrics").body.decode()
    assert sum(predictor.model.batches) == len(places)
    assert max(predictor.model.batches) == 4
    assert f"m2f_batch_images_sum {float(len(places))}" in sizes


def test_a_failure_of_the_model_is_answered_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    predictor = brightness()
    predictor.model.failures = 1
    with running(predictor) as port:
        answer = ask(port, "POST", "/instances", picture())
        assert answer.status == 500
        assert answer.reason == "The model failed (RuntimeError); see the server's log."
        assert ask(port, "POST", "/instances", picture()).status == 200
    assert "out of memory" in caplog.text


def test_a_large_image_of_a_client_that_has_gone_blocks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2f_trainer.serve.app.GONE_SECONDS", 0.01)
    predictor = brightness()
    predictor.tiling = Tiling(64, 0.0, predictor.padded_size)
    predictor.model.gate.clear()
    with running(predictor) as port:
        client = http.client.HTTPConnection("127.0.0.1", port)
        client.request("POST", "/instances", picture(64, 64 * 100))
        assert predictor.model.started.acquire(timeout=60)
        client.close()
        while b'm2f_requests_total{path="/instances",status="499"} 1.0' not in ask(port, "GET", "/metrics").body:
            pass
        predictor.model.gate.set()
        assert ask(port, "POST", "/instances", picture(64, 64)).status == 200
    assert predictor.model.batches == [4, 1]


def test_an_unexpected_error_is_answered_as_json_and_logged(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("no polygons")

    monkeypatch.setattr("m2f_trainer.serve.app.polygon_results", broken)
    answer = ask(port, "POST", "/instances?format=polygons", picture())
    assert (answer.status, answer.reason) == (500, "The request failed (RuntimeError); see the server's log.")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "RuntimeError: no polygons" in caplog.text


def test_a_wrong_parameter_is_named(port: int) -> None:
    for query in ("threshold=7", "threshold=nan", "threshold=high", "format=xml", "image_id=one"):
        answer = ask(port, "POST", f"/instances?{query}", picture())
        assert answer.status == 400, query
        assert answer.reason.startswith(query.split("=")[0] + ": ")
        assert repr(query.split("=")[1]) in answer.reason


def test_parameters_that_would_have_no_effect_are_refused(port: int) -> None:
    answer = ask(port, "POST", "/instances?thresold=0.5", picture())
    assert (answer.status, answer.reason) == (400, "Expected the parameters format, image_id, threshold, got thresold.")
    body, headers = form(picture())
    field = b'--edge\r\nContent-Disposition: form-data; name="threshold"\r\n\r\n0.9\r\n'
    answer = ask(port, "POST", "/instances", field + body, headers)
    assert (answer.status, "in the address: ?threshold=0.5" in answer.reason) == (400, True)
    assert "got the field threshold, too" in answer.reason
    answer = ask(port, "POST", "/instances", field.replace(b"threshold", b"comment") + body, headers)
    assert "got the field comment, too. Leave it out" in answer.reason


def test_health_describes_the_model(port: int) -> None:
    answer = ask(port, "GET", "/health")
    assert answer.status == 200
    assert answer.json["status"] == "UP"
    assert answer.json["model"] == "tiny"
    assert answer.json["categories"] == [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}]
    assert answer.json["thresholds"] == {"3": 0.5, "17": 0.5}


def test_metrics_count_answers_by_path_and_status() -> None:
    with running(brightness()) as port:
        ask(port, "POST", "/instances", picture())
        ask(port, "POST", "/instances", b"none")
        ask(port, "GET", "/somewhere/else")
        answer = ask(port, "GET", "/metrics")
    text = answer.body.decode()
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'm2f_requests_total{path="/instances",status="200"} 1.0' in text
    assert 'm2f_requests_total{path="/instances",status="400"} 1.0' in text
    assert 'm2f_requests_total{path="other",status="404"} 1.0' in text
    assert 'm2f_request_seconds_count{path="/instances"} 2.0' in text
    assert "m2f_queue_images 0.0" in text


def test_a_browser_that_was_led_here_by_another_name_is_sent_away(tiny: Predictor) -> None:
    with running(tiny) as port:
        for host, status in (("localhost", 200), (f"127.0.0.1:{port}", 200), ("evil.example", 421), ("[::1", 421)):
            assert ask(port, "GET", "/health", headers={"Host": host}).status == status, host
    with running(tiny, hosts=None) as port:
        assert ask(port, "GET", "/health", headers={"Host": "m2f.lan"}).status == 200


def test_answers_forbid_browsers_to_run_or_store_them(port: int) -> None:
    answer = ask(port, "GET", "/health")
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


def test_the_page_loads_nothing_and_asks_its_own_server_only(port: int) -> None:
    answer = ask(port, "GET", "/")
    page = answer.body.decode()
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    assert html.unescape(policy).startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha"
    )
    assert "connect-src 'self';" in html.unescape(policy)
    assert not re.findall(r"<(?!input)[^>]* (?:src|href|action)=", page)
    (model,) = re.findall(r'data-model="(.*?)"', page)
    assert json.loads(html.unescape(model)) == {
        "model": "tiny",
        "categories": [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}],
        "thresholds": {"3": 0.5, "17": 0.5},
    }


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_there_is_no_page_that_loads_scripts_from_elsewhere(port: int, path: str) -> None:
    assert ask(port, "GET", path).status == 404
