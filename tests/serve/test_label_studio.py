"""Label Studio's requests are answered with regions that it shows; images elsewhere are not opened."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from m2f_trainer.errors import DataError, ImageError, RecipeError
from m2f_trainer.inference.instances import Instances
from m2f_trainer.masks.segmentation import decode, encode, to_counts
from m2f_trainer.serve.label_studio import ImageReader, brush_rle, find_control, prediction
from tests.serve.loopback import ask, brightness, picture, post, running

NAMES = {7: "light", 3: "other"}


def config(tag: str = "BrushLabels", labels: str = '<Label value="light"/>', key: str = "$photo") -> str:
    return f'<View><Image name="img" value="{key}"/><{tag} name="tag" toName="img">{labels}</{tag}></View>'


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def predict_request(*images: str, **changes: Any) -> dict[str, Any]:
    """What Label Studio sends to /predict, field by field (MLApi.make_predictions, label_studio_ml.api)."""
    tasks = [{"id": number, "data": {"photo": image}} for number, image in enumerate(images, start=11)]
    params = {"login": None, "password": None, "context": None}
    request = {"tasks": tasks, "model_version": "tiny", "project": "1.1654592272", "label_config": config()}
    return {**request, "params": params, **changes}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of a predictor of bright areas."""
    with running(brightness(), threshold=0.5) as number:
        yield number


def read_bits(rle: list[int]) -> np.ndarray:
    """The values of a list of bytes, read bit by bit as @thi.ng/rle-pack describes its format."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, width = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        repeated = take(1)
        count = take(sizes[take(2)]) + 1
        values += [take(width)] * count if repeated else [take(width) for _ in range(count)]
    assert len(values) == total
    assert len(bits) - place < 8
    return np.array(values)


def test_a_brush_mask_equals_the_bytes_written_out_by_hand() -> None:
    # 12 values of 8 bits, lengths of 3, 4, 8 or 16 bits; then 4 x 0 (3 bits: 3), 8 x 255 (3 bits: 7)
    head = f"{12:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"
    runs = ("1" + "00" + "011" + "00000000") + ("1" + "00" + "111" + "11111111")
    bits = head + runs
    bits += "0" * (-len(bits) % 8)
    expected = [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]
    assert brush_rle(np.array([[0, 1, 1]], np.uint8)) == expected


MASKS = {
    "empty": np.zeros((5, 7), np.uint8),
    "full": np.ones((5, 7), np.uint8),
    "one run of 65536 values": np.ones((128, 128), np.uint8),
    "longer runs than a field holds": np.repeat(np.array([0, 1, 0], np.uint8), 33_000)[:, None].reshape(330, 300),
    "noise": (np.random.default_rng(0).random((40, 33)) > 0.5).astype(np.uint8),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_brush_mask_can_be_read_again(mask: np.ndarray) -> None:
    values = read_bits(brush_rle(mask)).reshape(*mask.shape, 4)
    assert (values == 255 * mask[..., None]).all()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_label_studio_itself_reads_a_brush_mask(mask: np.ndarray) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="pip install label-studio-sdk to compare")
    assert (brush.decode_rle(brush_rle(mask)).reshape(*mask.shape, 4)[..., 3] == 255 * mask).all()


def test_a_connected_project_is_checked(port: int, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(port, "GET", "/health").json["status"] == "UP"
    sent = {"project": "1.1654592272", "schema": config(), "hostname": "http://localhost:8080", "access_token": "abc"}
    with caplog.at_level(logging.WARNING):
        answer = post(port, "/setup", sent)
    assert (answer.status, answer.json) == (200, {"model_version": "tiny"})
    assert "classes without a label are left out: other." in caplog.text
    refused = post(port, "/setup", {**sent, "schema": config(labels='<Label value="cat"/>')})
    assert refused.status == 400
    assert "expected labels named as the model's classes (light, other), found cat" in refused.reason
    assert post(port, "/setup", {**sent, "schema": ""}).status == 200


def test_a_task_is_answered_with_a_brush_mask(port: int) -> None:
    answer = post(port, "/predict", predict_request(data_uri(picture()), data_uri(picture(left=20))))
    assert answer.status == 200, answer.body
    assert answer.json["model_version"] == "tiny"
    first, second = answer.json["results"]
    (region,) = first["result"]
    assert region["type"] == "brushlabels"
    assert (region["from_name"], region["to_name"]) == ("tag", "img")
    assert (region["original_width"], region["original_height"], region["image_rotation"]) == (60, 80, 0)
    assert region["value"]["brushlabels"] == ["light"]
    assert region["value"]["format"] == "rle"
    assert first["score"] == region["score"] > 0.9
    assert first["model_version"] == "tiny"
    (truth,) = ask(port, "POST", "/instances", picture()).json
    mask = read_bits(region["value"]["rle"]).reshape(80, 60, 4)[..., 3] > 0
    assert (mask == decode(truth["segmentation"]["counts"], 80, 60)).all()
    assert region["id"] != second["result"][0]["id"]


def test_a_task_is_answered_with_polygons_in_percent(port: int) -> None:
    answer = post(port, "/predict", predict_request(data_uri(picture()), label_config=config("PolygonLabels")))
    (region,) = answer.json["results"][0]["result"]
    assert region["type"] == "polygonlabels"
    assert region["value"]["polygonlabels"] == ["light"]
    points = np.array(region["value"]["points"]) * [0.6, 0.8]  # in pixels
    assert len(points) <= 12
    (truth,) = ask(port, "POST", "/instances", picture()).json
    mask = decode(truth["segmentation"]["counts"], 80, 60)
    drawn = decode(to_counts([points.reshape(-1).tolist()], 80, 60, "answer"), 80, 60)
    assert (mask & drawn).sum() / (mask | drawn).sum() > 0.9


@pytest.mark.parametrize("tag", ["BrushLabels", "PolygonLabels"])
def test_label_studio_itself_accepts_a_prediction(port: int, tag: str) -> None:
    interface = pytest.importorskip(
        "label_studio_sdk.label_interface", reason="pip install label-studio-sdk to compare"
    )
    answer = post(port, "/predict", predict_request(data_uri(picture()), label_config=config(tag))).json["results"][0]
    assert len(answer["result"]) == 1
    assert interface.LabelInterface(config(tag)).validate_prediction(answer, return_errors=True) == []


def test_a_task_without_a_readable_image_has_no_prediction_but_the_reason(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    good, broken = data_uri(picture()), data_uri(b"none")
    first, second, third = post(port, "/predict", predict_request(broken, good, "/etc/passwd")).json["results"]
    assert {*first, *third} == {"error"}  # Label Studio logs it, stores no prediction, and asks again
    assert first["error"].startswith("task 11: the image: ")
    assert "not an image of a known format" in first["error"]
    assert "this server opens no addresses" in third["error"]
    assert len(second["result"]) == 1
    assert "Label Studio: task 13: the image is at /etc/passwd" in caplog.text
    alone = post(port, "/predict", predict_request(broken))
    assert alone.status == 400
    assert "not an image of a known format" in alone.reason


@pytest.mark.parametrize(
    "address", ["/data/upload/\ud800.png", "data:\ud800", "data:image/png;base64,\udfff", "http://["]
)
def test_a_task_whose_address_is_no_text_is_answered_with_the_reason_and_the_others_with_regions(address: str) -> None:
    reader = ImageReader("http://127.0.0.1:9", "secret")
    with running(brightness(), threshold=0.5, reader=reader) as number:
        answer = post(number, "/predict", predict_request(address, data_uri(picture())))
        named = post(number, "/predict", predict_request(tasks=[{"id": "\ud800", "data": {"photo": address}}]))
    first, second = answer.json["results"]
    assert first["error"].startswith("task 11: ")
    assert len(second["result"]) == 1
    assert (named.status, named.reason[:8]) == (400, "task ?: ")


def test_a_configuration_that_is_no_text_is_refused(port: int) -> None:
    broken = "\ud800" + config()
    for path, content in (("/setup", {"schema": broken}), ("/predict", predict_request(label_config=broken))):
        answer = post(port, path, content)
        assert answer.status == 400
        assert "label config: expected XML, got an error at" in answer.reason


def test_other_requests_of_label_studio_have_no_effect(port: int) -> None:
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 1}}
    assert post(port, "/webhook", event).json == {"status": "ignored", "model_version": "tiny"}
    for method in ("GET", "POST"):  # Label Studio 1.23, and label_studio_ml's own server
        assert ask(port, method, "/versions", b"{}").json == {"versions": ["tiny"]}
    assert post(port, "/predict", predict_request()).json == {"results": [], "model_version": "tiny"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG", "Expected JSON of Label Studio. Send images to /instances."),
        (b"[]", "Expected a JSON object of Label Studio. Send images to /instances."),
        (b"[" * 100_000, "Expected JSON of Label Studio. Send images to /instances."),
        (b"{}", "label config: expected the XML of a labelling configuration."),
        (json.dumps(predict_request(tasks="all")).encode(), "tasks: expected a list of objects."),
        (json.dumps(predict_request(tasks=[1])).encode(), "tasks: expected a list of objects."),
    ],
    ids=["image", "list", "deep", "nothing", "no tasks", "no task"],
)
def test_what_label_studio_does_not_send_is_refused(port: int, content: bytes, reason: str) -> None:
    answer = ask(port, "POST", "/predict", content)
    assert (answer.status, answer.reason) == (400, reason)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ('<Label value="light"/><Label value="other"/>', {7: "light", 3: "other"}),
        ('<Label value="Lamp" predicted_values="lamp, light"/>', {7: "Lamp"}),
        ('<Label value="light" alias="L"/>', {7: "L"}),
        ('<View><Label value="other"/></View>', {3: "other"}),
    ],
)
def test_classes_belong_to_labels_by_value_alias_or_predicted_values(labels: str, found: dict[int, str]) -> None:
    assert find_control(config(labels=labels), NAMES).labels == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<View>", "label config: expected XML, got an error at"),
        ("<View/>", "expected <Image"),
        (config(tag="RectangleLabels"), "<BrushLabels> or <PolygonLabels>"),
        (config(key="photo"), "expected value=\"$key\" in <Image>, got 'photo'"),
        ('<!DOCTYPE a [<!ENTITY b "cc">]><View/>', "expected XML without DOCTYPE and ENTITY"),
    ],
)
def test_a_configuration_that_cannot_be_answered_is_refused(text: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        find_control(text, NAMES)
    assert reason in str(caught.value)


def test_an_instance_in_two_parts_has_a_polygon_for_each() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[2:6, 2:6] = mask[10:18, 10:18] = 1
    entry = {"image_id": 0, "category_id": 7, "score": 0.75, "segmentation": {"size": [20, 20], "counts": encode(mask)}}
    other = {**entry, "category_id": 3}
    (instances,) = Instances.from_coco([entry, other])
    answer = prediction(instances, find_control(config("PolygonLabels"), NAMES), "v")
    points = [sorted(region["value"]["points"]) for region in answer["result"]]
    assert points == [[[10, 10], [10, 30], [30, 10], [30, 30]], [[50, 50], [50, 90], [90, 50], [90, 90]]]
    assert answer["score"] == 0.75


@dataclass
class Studio:
    """A Label Studio server on loopback that serves one image, and what it was asked."""

    port: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    expired: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


LEGACY, PERSONAL = "0123456789abcdef", "a.b.c"


@pytest.fixture
def studio() -> Iterator[Studio]:
    """It knows the tokens `LEGACY`, `PERSONAL` and, if exchanged for the latter, "new.access.token"."""
    state = Studio()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Be quiet."""

        def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "")
            state.asked.append((self.path, token))
            known = token in (f"Token {LEGACY}", "Bearer new.access.token")
            if state.expired or not known:
                state.expired = False
                self.answer(401)
            elif "redirect" in self.path:
                self.answer(302, Location="http://127.0.0.1:1/")
            elif "large" in self.path:
                self.answer(200, bytes(100_001))
            elif "missing" in self.path:
                self.answer(404)
            else:
                self.answer(200, picture())

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((self.path, sent["refresh"]))
            if sent == {"refresh": PERSONAL}:
                self.answer(200, b'{"access": "new.access.token"}')
            else:
                self.answer(401, b'{"detail": "no"}')

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.port = server.server_port
        yield state
        server.shutdown()
        thread.join()


def read(reader: ImageReader, address: object) -> bytes:
    return reader.read({"id": 5, "data": {"photo": address}}, "photo")


def test_images_of_the_named_label_studio_are_read_with_its_token(studio: Studio) -> None:
    reader = ImageReader(studio.url, LEGACY)
    paths = ["/data/upload/1/a.png", "/data/local-files/?d=a/b.png", "/tasks/5/resolve/?fileuri=czM6"]
    for address in (*paths, studio.url + paths[0], "upload/1/a.png"):
        assert read(reader, address) == picture()
    token = f"Token {LEGACY}"
    assert studio.asked == [(path, token) for path in (*paths, paths[0], paths[0])]


def test_a_personal_access_token_is_exchanged_and_renewed(studio: Studio) -> None:
    reader = ImageReader(studio.url, PERSONAL)
    assert read(reader, "/data/upload/1/a.png") == read(reader, "/data/upload/1/a.png") == picture()
    assert [path for path, _ in studio.asked].count("/api/token/refresh/") == 1
    studio.expired = True
    assert read(reader, "/data/upload/1/a.png") == picture()
    assert [path for path, _ in studio.asked].count("/api/token/refresh/") == 2
    with pytest.raises(ImageError, match=r"refused the token in LABEL_STUDIO_API_KEY \(status 401\)"):
        read(ImageReader(studio.url, "x.y.z"), "/data/upload/1/a.png")


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1/data/upload/1/a.png",
        "https://{host}/data/upload/1/a.png",
        "http://user@{host}/data/upload/1/a.png",
        "http://{host}/api/projects",
        "//{host}.evil.example/data/a.png",
        "/api/projects",
        "/data/../api/projects",
        "/data/%2e%2e/api/projects",
        "/data/..%5capi",
        "/data/a.png HTTP/1.1\r\nX: y",
        "file:///etc/passwd",
        "/etc/passwd",
        "s3://bucket/a.png",
        "ftp://{host}/data/a.png",
    ],
)
def test_no_other_address_is_opened_and_the_token_is_kept(studio: Studio, address: str) -> None:
    with pytest.raises(ImageError, match="Images elsewhere are not opened"):
        read(ImageReader(studio.url, LEGACY), address.format(host=f"127.0.0.1:{studio.port}"))
    assert studio.asked == []


def test_a_server_below_a_path_is_asked_below_it_only(studio: Studio) -> None:
    reader = ImageReader(f"{studio.url}/label/", LEGACY)
    for address in ("/data/upload/1/a.png", "/label/data/upload/1/a.png", f"{studio.url}/label/data/upload/1/a.png"):
        assert read(reader, address) == picture()
    assert {path for path, _ in studio.asked} == {"/label/data/upload/1/a.png"}
    with pytest.raises(ImageError, match="Images elsewhere are not opened"):
        read(reader, f"{studio.url}/data/upload/1/a.png")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("/data/upload/redirect", "status 302. Redirects are not followed"),
        ("/data/upload/missing", "status 404. Check LABEL_STUDIO_API_KEY and the task."),
        ("/data/upload/large", "expected an image of at most 100,000 bytes"),
        (None, "expected the address of an image under 'photo' of its data, found none"),
        ("data:image/png,abc", "expected data:image/...;base64, before an image in a data: URI, got 'data:image/png'"),
        ("data:image/png;base64,?", "the base64 of its data: URI is damaged"),
    ],
)
def test_an_image_that_cannot_be_read_is_an_error_with_the_reason(
    studio: Studio, address: str | None, reason: str
) -> None:
    with pytest.raises(ImageError) as caught:
        read(ImageReader(studio.url, LEGACY, limit=100_000), address)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("task 5")
    assert LEGACY not in str(caught.value)


def test_a_label_studio_that_is_down_is_an_error() -> None:
    with pytest.raises(ImageError, match=r"Label Studio at http://127\.0\.0\.1:1 can't be read"):
        read(ImageReader("http://127.0.0.1:1", LEGACY), "/data/upload/1/a.png")


def test_an_address_needs_a_scheme_and_a_token() -> None:
    with pytest.raises(RecipeError, match="expected an address such as http://localhost:8080, got 'localhost:8080'"):
        ImageReader("localhost:8080", LEGACY)
    with pytest.raises(RecipeError, match="LABEL_STUDIO_API_KEY"):
        ImageReader("http://localhost:8080", None)
