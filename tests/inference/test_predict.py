"""`m2f predict`: any inputs, several outputs, and no repeated work."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2f_trainer.data.images import image_size
from m2f_trainer.errors import DataError, ImageError, RecipeError
from m2f_trainer.inference import predict as folder
from m2f_trainer.inference.instances import Instances
from m2f_trainer.inference.predict import PredictOptions, predict_folder
from m2f_trainer.inference.predictor import Frame, Predictor
from m2f_trainer.model.mask2former import M2FConfig
from tests.inference.test_predictor import BrightnessModel, picture


class Counting(Predictor):
    """Counts the images that it predicts, and raises at one of them if configured to."""

    seen = 0
    dies_at = -1

    def _predict(self, batch: Sequence[Frame], *options: Any) -> list[Instances]:
        type(self).seen += len(batch)
        if type(self).seen == type(self).dies_at:
            raise KeyboardInterrupt
        return super()._predict(batch, *options)


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    Counting.seen, Counting.dies_at = 0, -1
    monkeypatch.setattr(Counting, "from_pretrained", lambda _, precision: Counting(BrightnessModel()))  # type: ignore[arg-type]
    monkeypatch.setattr(folder, "Predictor", Counting)
    return Counting


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(4):
        picture(80 + number, 60).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def test_a_folder_gives_pictures_results_and_a_table_that_agree(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    out = predict_folder("m", [photos], tmp_path / "out", PredictOptions(batch_size=3))
    results = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert [(one["image_id"], Path(one["file_name"]).name) for one in results] == [(k, f"{k}.png") for k in range(4)]
    assert set(results[0]) == {"image_id", "category_id", "segmentation", "score", "file_name"}
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["light"] * 4
    assert float(rows[0]["width"]) == pytest.approx(30, abs=3)
    assert float(rows[0]["score"]) == pytest.approx(results[0]["score"], abs=1e-6)
    assert {path.name for path in out.glob("*.png")} == {f"{k}.instances.png" for k in range(4)}


def test_a_run_that_was_cut_off_goes_on_with_the_images_that_are_left(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    predictor.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        predict_folder("m", [photos], tmp_path / "out", PredictOptions(batch_size=1))
    assert not (tmp_path / "out" / "predictions.json").exists()
    predictor.seen, predictor.dies_at = 0, -1
    out = predict_folder("m", [photos], tmp_path / "out", PredictOptions(batch_size=1))
    assert predictor.seen == 2
    straight = predict_folder("m", [photos], tmp_path / "straight", PredictOptions(batch_size=1))
    for name in ("predictions.json", "predictions.csv"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()
    predictor.seen = 0
    predict_folder("m", [photos], out, PredictOptions(batch_size=1))
    assert predictor.seen == 0
    predict_folder("m", [photos], out, PredictOptions(batch_size=1, threshold=0.1))
    assert predictor.seen == 4, "another threshold is another result"
    picture(90, 90).save(photos / "1.png")
    predict_folder("m", [photos], out, PredictOptions(batch_size=1, threshold=0.1))
    assert predictor.seen == 5, "a changed image is predicted again"


def test_a_pattern_takes_what_matches_and_one_that_matches_nothing_is_an_error(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    out = predict_folder("m", [photos / "[12].png"], tmp_path / "out")
    assert {path.name for path in out.glob("*.png")} == {"1.instances.png", "2.instances.png"}
    with pytest.raises(DataError, match="found nothing"):
        predict_folder("m", [photos / "*.jpg"], tmp_path / "none")


def test_the_images_own_folder_can_take_the_pictures_time_and_again(predictor: type[Counting], photos: Path) -> None:
    before = {path.name: path.read_bytes() for path in photos.glob("*.png")}
    predict_folder("m", [photos], photos)
    predict_folder("m", [photos], photos, PredictOptions(threshold=0.1))
    assert {name: (photos / name).read_bytes() for name in before} == before
    assert len(list(photos.glob("*.png"))) == 8


def test_where_nothing_is_found_a_lower_threshold_is_advised(
    predictor: type[Counting], photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predict_folder("m", [photos], tmp_path / "out", PredictOptions(threshold=0.99999))
    assert "Nothing scored above 0.99999: try a lower --threshold." in caplog.text


def test_tiles_find_in_a_mosaic_what_single_images_show(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    pixels = np.zeros((64, 300, 3), np.uint8)
    for left in (30, 130, 230):
        pixels[20:40, left : left + 24] = 255
    Image.fromarray(pixels).save(tmp_path / "mosaic.png")
    out = predict_folder("m", [tmp_path / "mosaic.png"], tmp_path / "out", PredictOptions(tile=96, overlap=0.2))
    (found,) = [json.loads((out / "predictions.json").read_text(encoding="utf-8"))]
    assert len(found) == 3
    assert all(one["segmentation"]["size"] == [64, 300] for one in found)
    assert predictor.seen == 4


def test_predictions_become_a_dataset_that_our_own_reader_takes(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    from m2f_trainer.data.dataset import load_coco

    out = predict_folder("m", [photos], tmp_path / "out", PredictOptions(dataset=True))
    (photos / "train").mkdir()
    for path in photos.glob("*.png"):
        path.rename(photos / "train" / path.name)
    (out / "_annotations.coco.json").rename(photos / "train" / "_annotations.coco.json")
    rows = load_coco(photos, cache_dir=tmp_path / "cache")["train"]
    results = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert [row["objects"][0]["category_id"] for row in rows] == [7] * 4
    assert rows[0]["objects"][0]["counts"] == results[0]["segmentation"]["counts"]


def test_images_of_one_name_in_two_folders_stay_apart_in_the_dataset(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    (photos / "more").mkdir()
    picture(50, 40).save(photos / "more" / "0.png")
    out = predict_folder("m", [photos], tmp_path / "out", PredictOptions(dataset=True, recursive=True))
    images = json.loads((out / "_annotations.coco.json").read_text(encoding="utf-8"))["images"]
    assert [one["file_name"] for one in images] == ["0.png", "1.png", "2.png", "3.png", "more/0.png"]
    sizes = [image_size(photos / one["file_name"], one["file_name"]) for one in images]
    assert sizes == [(one["height"], one["width"]) for one in images]


def test_a_file_whose_name_is_no_utf_8_has_its_row_and_picture(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    try:
        (photos / "0.png").rename(photos / odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    out = predict_folder("m", [photos], tmp_path / "out", PredictOptions(dataset=True))
    results = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert Path(results[-1]["file_name"]) == photos / odd
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert [row["file_name"] for row in csv.DictReader(file)][-1].endswith("caf\\udce9.png")


def test_pictures_have_names_that_differ_on_every_file_system() -> None:
    paths = [Path("a/Cell.png"), Path("b/cell.jpg"), Path("c/cell.png"), Path("cell.mp4")]
    assert folder.picture_names(paths) == [
        "Cell.instances.png", "cell-2.instances.png", "cell-3.instances.png", "cell.instances.mp4",
    ]  # fmt: skip


@pytest.mark.parametrize("letter", ["a", "细"])
def test_the_longest_file_names_have_their_own_pictures(letter: str, predictor: type[Counting], tmp_path: Path) -> None:
    stem = letter * (249 // len(letter.encode()))
    paths = [tmp_path / name for name in (f"{stem}1.png", f"{stem}2.png", f"more/{stem}1.png")]
    (tmp_path / "more").mkdir()
    for path in paths:
        picture(40, 40).save(path)
    out = predict_folder("m", paths, tmp_path / "out")
    assert len(json.loads((out / "predictions.json").read_text(encoding="utf-8"))) == 3
    drawn = {path.name for path in out.glob("*.instances.png")}
    assert len(drawn) == 3
    assert all(name.startswith(letter * 50) for name in drawn)
    predict_folder("m", paths, out)
    assert predictor.seen == 3


def test_a_picture_that_was_deleted_is_drawn_again(predictor: type[Counting], photos: Path, tmp_path: Path) -> None:
    out = predict_folder("m", [photos], tmp_path / "out")
    (out / "2.instances.png").unlink()
    (out / ".parts/3.instances.png.json").write_text("{")
    predictor.seen = 0
    predict_folder("m", [photos], out)
    assert predictor.seen == 2
    assert (out / "2.instances.png").is_file()


def test_images_too_large_to_be_drawn_are_counted(
    predictor: type[Counting],
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folder, "LARGEST_PICTURE", 81 * 60)
    for _ in range(2):
        caplog.clear()
        out = predict_folder("m", [photos], tmp_path / "out")
        assert "No overlay of 2 image(s) of more than 4,860 pixels" in caplog.text
    assert len(list(out.glob("*.png"))) == 2
    assert predictor.seen == 4


def test_a_tile_of_more_pixels_than_an_image_may_have_is_refused_at_once(
    predictor: type[Counting], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2F_MAX_PIXELS", "3000000")
    message = r"a tile of 2000 x 2000 pixels has more than --max_pixels 3,000,000: lower --tile, or raise --max_pixels"
    with pytest.raises(RecipeError, match=message):
        predict_folder("m", [photos], tmp_path / "out", PredictOptions(tile=2000))
    assert predictor.seen == 0


def test_hidden_files_and_folders_called_like_images_are_no_inputs(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    (photos / "._0.png").write_bytes(b"\x00\x05\x16\x07 what macOS leaves")
    (photos / "scans.png").mkdir()
    for seen, source in ((4, photos), (8, photos / "*.png")):
        predict_folder("m", [source], tmp_path / f"out{seen}", PredictOptions(recursive=True))
        assert predictor.seen == seen


def test_an_input_that_is_named_twice_is_predicted_once_and_counted(
    predictor: type[Counting], photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = Path(os.path.relpath(photos))
    (tmp_path / "latest").symlink_to(photos)
    (photos / "link.png").symlink_to("0.png")  # another file name, which has its own results
    two = here / "2.png"
    named = [two, photos, two, here / "[01].png", photos / "../in/3.png", tmp_path / "latest/1.png"]
    out = predict_folder("m", named, tmp_path / "out", PredictOptions(dataset=True))
    assert predictor.seen == 5
    assert "6 repeated input(s) left out: each is predicted once" in caplog.text
    images = json.loads((out / "_annotations.coco.json").read_text(encoding="utf-8"))["images"]
    assert [one["file_name"] for one in images] == ["2.png", "0.png", "1.png", "3.png", "link.png"]
    assert len(json.loads((out / "predictions.json").read_text(encoding="utf-8"))) == 5


def test_a_dataset_of_a_video_is_refused_at_once(predictor: type[Counting], photos: Path, tmp_path: Path) -> None:
    (photos / "clip.mp4").write_bytes(b"any")
    message = r"clip\.mp4: --format coco_dataset takes image files, got 1 video\(s\).*ffmpeg"
    with pytest.raises(RecipeError, match=message):
        predict_folder("m", [photos], tmp_path / "out", PredictOptions(dataset=True))
    assert predictor.seen == 0
    assert not (tmp_path / "out").exists()


def test_a_video_gives_a_video_and_a_record_a_frame(predictor: type[Counting], photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra `video` is not installed")
    from fractions import Fraction

    from m2f_trainer.inference.video import frame_rate, frames, write_video

    write_video((picture(64, 48) for _ in range(5)), tmp_path / "clip.mp4", Fraction(10))
    out = predict_folder("m", [tmp_path / "clip.mp4"], tmp_path / "out")
    results = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert [one["file_name"].rsplit("#")[1] for one in results] == list("01234")
    drawn = list(frames(out / "clip.instances.mp4"))
    assert (len(drawn), drawn[0].size, frame_rate(out / "clip.instances.mp4")) == (5, (48, 64), 10)
    assert np.abs(np.asarray(drawn[0], int) - np.asarray(picture(64, 48), int)).max() > 60, "instances are drawn"


def test_a_video_without_a_frame_that_can_be_decoded_is_listed_and_the_rest_is_done(
    predictor: type[Counting], tmp_path: Path
) -> None:
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in/whole.mp4"), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(picture(64, 48))))
        container.mux(stream.encode())
    whole = (tmp_path / "in/whole.mp4").read_bytes()
    cut = whole.index(b"\x1f\x43\xb6\x75") + 40  # the id of the first cluster, and the start of its frame
    (tmp_path / "in/broken.mp4").write_bytes(whole[:cut])
    with pytest.raises(ImageError, match=r"1 of 2 inputs can't be read.*\n.*broken\.mp4: no frame can be decoded"):
        predict_folder("m", [tmp_path / "in"], tmp_path / "out")
    results = json.loads((tmp_path / "out/predictions.json").read_text(encoding="utf-8"))
    assert {Path(one["file_name"].split("#")[0]).name for one in results} == {"whole.mp4"}
    assert [path.name for path in tmp_path.glob("out/*.mp4")] == ["whole.instances.mp4"]


def test_inputs_that_can_not_be_read_are_listed_and_the_rest_is_done(
    predictor: type[Counting], photos: Path, tmp_path: Path
) -> None:
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:90])
    (photos / "2.png").write_bytes(b"")
    for tile in (None, 32):
        out = tmp_path / f"out{tile}"
        with pytest.raises(ImageError, match=r"2 of 4 inputs can't be read; the predictions of the other 2") as error:
            predict_folder("m", [photos], out, PredictOptions(batch_size=3, tile=tile))
        assert re.search(r"1\.png.*damaged.*\n.*2\.png.*the file is empty", str(error.value))
        results = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
        assert {Path(one["file_name"]).name for one in results} == {"0.png", "3.png"}
        assert {path.name for path in out.glob("*.png")} == {"0.instances.png", "3.instances.png"}
    predictor.seen = 0
    picture(80, 60).save(photos / "1.png")
    picture(80, 60).save(photos / "2.png")
    predict_folder("m", [photos], tmp_path / "outNone", PredictOptions(batch_size=3))
    assert predictor.seen == 2


def test_a_model_or_merging_that_has_changed_predicts_again(
    predictor: type[Counting], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_folder("m", [photos], tmp_path / "out")
    predict_folder("m", [photos], tmp_path / "out")
    assert predictor.seen == 4
    config = M2FConfig(thresholds=[0.1])
    assert folder.model_version("m", config) == folder.model_version("m", M2FConfig(thresholds=[0.1]))
    changed = [folder.model_version("other", config), folder.model_version("m", M2FConfig(thresholds=[0.2]))]
    config._commit_hash = "b"  # of a model from the Hub
    assert (
        len({folder.model_version("m", M2FConfig(thresholds=[0.1])), folder.model_version("m", config), *changed}) == 4
    )
    monkeypatch.setattr(folder, "CANDIDATES", 0.03)
    predict_folder("m", [photos], tmp_path / "out")
    assert predictor.seen == 8


def test_every_format_that_pillow_opens_is_an_input_and_other_files_are_counted(
    predictor: type[Counting], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in/deeper").mkdir(parents=True)
    suffixes = [
        "jfif",
        "jpe",
        "avif",
        "jp2",
        "j2k",
        "tga",
        "qoi",
        "pcx",
        "ico",
        "dds",
        "sgi",
        "dib",
        "mpo",
        "pbm",
        "psd",
    ]
    written = []
    for suffix in suffixes:
        if f".{suffix}" in Image.registered_extensions() and suffix != "psd":
            picture(80, 60).convert("1" if suffix == "pbm" else "RGB").save(tmp_path / f"in/{suffix}.{suffix}")
            written.append(suffix)
    for name in ("notes.txt", "more.txt", "photo.DNG", "README", ".hidden"):
        (tmp_path / "in" / name).write_text("text")
    out = predict_folder("m", [tmp_path / "in"], tmp_path / "out")
    assert {path.name for path in out.glob("*.png")} == {f"{suffix}.instances.png" for suffix in written}
    assert len(written) >= 14
    assert "4 file(s) without the suffix of an image or video: 1 without suffix, 1 .dng, 2 .txt" in caplog.text
    assert "1 subfolder(s) are passed over; --recursive includes them" in caplog.text
    for name in written:
        (tmp_path / f"in/{name}.{name}").unlink()
    with pytest.raises(DataError, match=r"expected images or videos, found none \(4 file\(s\)"):
        predict_folder("m", [tmp_path / "in"], tmp_path / "out")
