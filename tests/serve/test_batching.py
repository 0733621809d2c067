"""Images that arrive together are predicted together, and each gets its own instances."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from m2f_trainer.data.tiles import Tiling
from m2f_trainer.errors import ImageError
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predictor import Predictor
from m2f_trainer.serve.batching import Batcher
from tests.model.tiny import tiny_model
from tests.serve.loopback import brightness, picture


def left_edge(future: Future[Instances]) -> float:
    """Where the bright rectangle of a picture begins, as it was predicted."""
    return float(future.result(60).boxes[0, 0])


def test_what_waits_while_the_model_computes_is_the_next_batch() -> None:
    predictor, sizes = brightness(), []
    batcher = Batcher(predictor, batch_size=4, max_wait=0.0, observe=sizes.append)
    predictor.model.gate.clear()
    first = batcher.submit(picture(left=0), 0.5)
    assert predictor.model.started.acquire(timeout=60)
    others = [batcher.submit(picture(left=left), 0.5) for left in (10, 20, 30, 0, 10)]
    assert batcher.waiting == 5
    predictor.model.gate.set()
    assert [left_edge(one) for one in (first, *others)] == pytest.approx([0, 10, 20, 30, 0, 10], abs=3)
    batcher.close()
    assert predictor.model.batches == sizes == [1, 4, 1]


def test_a_batch_that_is_not_full_does_not_wait_for_ever() -> None:
    batcher = Batcher(brightness(), batch_size=100, max_wait=0.01)
    assert len(batcher.submit(picture(), 0.5).result(60)) == 1
    batcher.close()


def test_a_broken_image_does_not_disturb_its_batch() -> None:
    predictor = brightness()
    batcher = Batcher(predictor, batch_size=3, max_wait=60.0)
    good, broken, last = (batcher.submit(content, 0.5) for content in (picture(), picture()[:120], picture(left=20)))
    with pytest.raises(ImageError, match=r"^the image: the image data is damaged"):
        broken.result(60)
    assert [left_edge(good), left_edge(last)] == pytest.approx([10, 20], abs=3)
    batcher.close()


def test_an_image_that_nobody_waits_for_any_more_is_left_out() -> None:
    predictor = brightness()
    batcher = Batcher(predictor, batch_size=3, max_wait=60.0)
    first, second = batcher.submit(picture(), 0.5), batcher.submit(picture(left=20), 0.5)
    assert first.cancel()
    third = batcher.submit(picture(left=0), 0.5)
    assert [left_edge(second), left_edge(third)] == pytest.approx([20, 0], abs=3)
    batcher.close()
    assert predictor.model.batches == [2]


def test_the_tiles_of_an_image_that_nobody_waits_for_any_more_are_given_up() -> None:
    predictor = brightness()
    predictor.tiling = Tiling(64, 0.0, predictor.padded_size)
    batcher = Batcher(predictor, batch_size=2, max_wait=60.0)
    predictor.model.gate.clear()
    large = batcher.submit(picture(64, 64 * 100), 0.5)
    small = batcher.submit(picture(64, 64, left=20), 0.5)
    assert predictor.model.started.acquire(timeout=60)
    assert large.cancel()
    predictor.model.gate.set()
    assert left_edge(small) == pytest.approx(20, abs=3)
    batcher.close()
    assert predictor.model.batches == [2, 1], "the batch of the large image that had begun, and the small image"


def test_an_image_that_is_given_up_takes_no_work_of_others_with_it() -> None:
    predictor = brightness()
    predictor.tiling = Tiling(64, 0.0, predictor.padded_size)
    batcher = Batcher(predictor, batch_size=2, max_wait=60.0)
    predictor.model.gate.clear()
    first, second = (batcher.submit(picture(64, 64 * tiles), 0.5) for tiles in (5, 1))
    assert predictor.model.started.acquire(timeout=60)
    assert second.cancel()
    predictor.model.gate.set()
    assert len(first.result(60)) == 1
    batcher.close()
    assert predictor.model.batches == [2, 2, 2]


def test_images_with_different_thresholds_keep_their_own() -> None:
    batcher = Batcher(brightness(), batch_size=3, max_wait=60.0)
    found = [batcher.submit(picture(), threshold) for threshold in (0.0, 0.99999, "auto")]
    assert [len(one.result(60)) for one in found] == [2, 0, 1]
    batcher.close()


def test_a_model_of_tiles_merges_them_as_the_predictor_does() -> None:
    predictor = Predictor(tiny_model(tile_size=64, tile_overlap=0.3))
    assert predictor.tiling is not None
    images = [picture(150, 200), picture(70, 60)]
    truth = [predictor(image, threshold=0.0)[0].to_coco() for image in images]
    batcher = Batcher(predictor, batch_size=2, max_wait=60.0)
    found = [batcher.submit(image, 0.0) for image in images]
    for one, expected in zip(found, truth, strict=True):
        assert [entry["segmentation"] for entry in one.result(60).to_coco()] == [
            entry["segmentation"] for entry in expected
        ]
    batcher.close()


def test_closing_predicts_what_is_in_the_queue() -> None:
    predictor = brightness()
    batcher = Batcher(predictor, batch_size=2, max_wait=0.0)
    predictor.model.gate.clear()
    found = [batcher.submit(picture(), 0.5) for _ in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    predictor.model.gate.set()
    closing.join(60)
    assert all(one.done() and len(one.result()) == 1 for one in found)
    assert not batcher.alive
