"""Datasets on the Hub read as they come: each image once an epoch, the same batches for any number of workers."""

import http.server
import pathlib
import re
import threading
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from m2f_trainer.data.collate import collate
from m2f_trainer.data.dataset import Category, load_coco
from m2f_trainer.data.hub_dataset import load_hub
from m2f_trainer.data.hub_streams import load_stream, open_stream
from m2f_trainer.data.streams import InstanceStream
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.transforms import TrainTransform
from m2f_trainer.errors import DataError
from tests.data.folders import SQUARE, content, write
from tests.data.test_hub_dataset import as_pushed

IMAGES = 14


@pytest.fixture(scope="module", params=[1, 4], ids=["one file", "four files"])
def pushed(request, tmp_path_factory):
    """A set as it lies on the Hub, in one or more files a split."""
    folder = tmp_path_factory.mktemp("stream")
    splits = load_coco(write_sample(folder / "set", images=(IMAGES, 3, 0)), cache_dir=folder / "cache")
    parts = {"train": splits["train"], "valid": splits["valid"]}
    return as_pushed(datasets.DatasetDict(parts), folder / "pushed", files=request.param)


@pytest.fixture(scope="module")
def stream(pushed, tmp_path_factory):
    return open_stream(pushed, cache_dir=str(tmp_path_factory.mktemp("cache")))[0]


def batches(stream, count, *, workers=0, rank=0, world=1, batch_size=3, first=0):
    """The first `count` batches of a rank; those before sample `first` are empty."""
    samples = InstanceStream(stream, with_epoch, seed=5)
    samples.deal(rank, world, batch_size)
    samples.span(first, count * batch_size)
    return list(DataLoader(samples, batch_size=batch_size, num_workers=workers, collate_fn=collate))


def with_epoch(row, epoch, index, rows):
    """A sample whose id tells its epoch too."""
    sample = TrainTransform(32, 32, seed=5)(row, epoch, index, rows)
    return {**sample, "image_id": 1000 * epoch + sample["image_id"]}


def ids(made):
    return [number for batch in made for number in batch["image_id"].tolist()]


def equal(one, other):
    return all(
        a["image_id"].equal(b["image_id"])
        and a["pixel_values"].equal(b["pixel_values"])
        and a["mask_labels"]["values"].equal(b["mask_labels"]["values"])
        for a, b in zip(one, other, strict=True)
    )


def test_every_image_comes_once_an_epoch_in_another_order_and_look(stream):
    made = batches(stream, 2 * IMAGES, batch_size=1)
    first, second = ids(made[:IMAGES]), [number - 1000 for number in ids(made[IMAGES:])]
    assert sorted(first) == sorted(second) == sorted({*first})
    assert first != second
    places = {number: k for k, number in enumerate(second)}
    again = [made[IMAGES + places[number]] for number in first]
    assert not any(a["pixel_values"].equal(b["pixel_values"]) for a, b in zip(made[:IMAGES], again, strict=True))


def test_batches_are_the_same_for_any_number_of_workers(stream):
    alone = batches(stream, 9)
    assert equal(alone, batches(stream, 9, workers=2))
    assert equal(alone, batches(stream, 9, workers=1))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_workers_share_an_epoch_without_loss_or_repeat(stream, world):
    shares = [
        ids(batches(stream, IMAGES, rank=rank, world=world, batch_size=1, workers=2 * (rank == 0)))
        for rank in range(world)
    ]
    epochs = [[number for share in shares for number in share if number // 1000 == epoch] for epoch in (0, 1)]
    assert all(sorted(epoch) == sorted({*epoch}) and len(epoch) == IMAGES for epoch in epochs)
    lengths = [sum(number < 1000 for number in share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("first", "workers"), [(3, 0), (12, 0), (33, 0), (33, 2)])  # 33 is in the third epoch
def test_a_resumed_stream_goes_on_where_it_was(stream, first, workers):
    whole = batches(stream, 14)
    resumed = batches(stream, 14, workers=workers, first=first)
    assert resumed[: first // 3] == [{}] * (first // 3)
    assert equal(resumed[first // 3 :], whole[first // 3 :])


def test_a_finished_run_reads_nothing(stream):
    samples = InstanceStream(stream, TrainTransform(32, 32))
    samples.span(12, 12)
    assert list(samples) == []


def test_other_splits_are_kept_as_rows_and_categories_are_those_of_the_set(pushed, stream, tmp_path):
    whole = load_hub(pushed, cache_dir=str(tmp_path))
    others = open_stream(pushed, cache_dir=str(tmp_path))[1]
    assert list(others) == ["valid"]
    assert others["valid"]["objects"][:] == whole["valid"]["objects"][:]
    assert others["valid"].info.description == whole["valid"].info.description
    assert stream.categories == tuple(Category(one.id, one.name) for one in stream.categories)


def test_a_stream_can_be_cut_short(stream):
    made = batches(stream.take(5), 10, batch_size=1)
    first, second = sorted(ids(made[:5])), sorted(ids(made[5:]))
    assert len({*first}) == 5
    assert second == [1000 + number for number in first]


def foreign(folder, category, **changes):
    """A set of another's making, with one object an image."""
    fields = datasets.List(
        {"category": category, "segmentation": datasets.List(datasets.List(datasets.Value("float64")))}
    )
    features = datasets.Features({"image": datasets.Image(), "objects": fields})
    image = Image.fromarray(np.arange(320, dtype=np.uint8).reshape(16, 20))
    row = {"image": image, "objects": [{"category": 1, "segmentation": SQUARE, **changes}]}
    rows = datasets.Dataset.from_list([row] * 3, features=features)
    return as_pushed(datasets.DatasetDict({"train": rows, "validation": rows}), folder)


def test_a_set_of_another_making_is_converted_as_it_comes(tmp_path):
    name = foreign(tmp_path / "set", datasets.ClassLabel(names=["cat", "dog"]))
    stream, others = open_stream(name, cache_dir=str(tmp_path / "cache"))
    assert stream.categories == (Category(0, "cat"), Category(1, "dog"))
    assert [len(rows) for rows in others.values()] == [3]
    (batch,) = batches(stream, 1, workers=1)
    assert torch.cat(batch["class_labels"]).unique().tolist() == [1]


def test_what_can_not_be_streamed_is_refused_with_advice(tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError, match=r"ClassLabel with the names of the classes.*Leave streaming out"):
        open_stream(foreign(tmp_path / "numbers", datasets.Value("int64")), **options)
    label = datasets.ClassLabel(names=["cat", "dog"])
    with pytest.raises(DataError, match=r"row 0, object 0.*at least three points"):
        open_stream(foreign(tmp_path / "bad", label, segmentation=[[1, 2, 3, 4]]), **options)
    with pytest.raises(DataError, match="Leave streaming out: of a COCO or YOLO folder"):
        load_stream(str(write(tmp_path / "coco", content())))


def test_more_processes_than_images_are_refused(stream):
    with pytest.raises(DataError, match="expected at least 40 training images"):
        batches(stream, 1, rank=39, world=40)


def test_workers_read_a_stream_over_http_after_their_parent_has(pushed, tmp_path):
    """The connection of fsspec lives in a thread, which a forked worker doesn't have."""
    handler = partial(Silent, directory=pushed)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/data"
        names = sorted(path.name for path in (tmp_path / pushed / "data").glob("*.parquet"))
        files = {
            split: [f"{address}/{name}" for name in names if name.startswith(split)] for split in ("train", "valid")
        }
        stream, _ = open_stream("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
        assert sorted(ids(batches(stream, IMAGES, batch_size=1, workers=2))) == list(range(1, IMAGES + 1))
        server.shutdown()


class Silent(http.server.SimpleHTTPRequestHandler):
    """Files in parts, as the Hub serves them."""

    def do_GET(self):
        body = pathlib.Path(self.translate_path(self.path)).read_bytes()
        first, last = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
        part = body[int(first) : int(last or len(body)) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass
