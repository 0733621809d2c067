"""Training on cached backbone maps equals training without, for the same views."""

import logging
import multiprocessing
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator
from datetime import timedelta
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.collate import InstanceDataset, collate
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.packed_samples import pack_sample
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.data.tiles import TileTransform, TrainTiles
from m2f_trainer.data.transforms import TrainTransform
from m2f_trainer.distributed import leave
from m2f_trainer.errors import DataError, RecipeError
from m2f_trainer.model.lora import set_tuning
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.training import feature_cache
from m2f_trainer.training.feature_cache import (
    AllViews,
    CachedViews,
    MapFiles,
    cache_key,
    with_cached_maps,
    within_minutes,
)
from m2f_trainer.training.run import train
from tests.data.test_packed_samples import sample_of
from tests.model.pretend_device import DEVICE, Waits
from tests.model.tiny import VIT, tiny_model
from tests.training.runs import write_tiny

Arguments = namedtuple(
    "Arguments",
    "output_dir device bf16 per_device_train_batch_size dataloader_num_workers max_minutes",
    defaults=(False, 2, 0, None),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_coco(write_sample(tmp_path_factory.mktemp("data"), images=(3, 1, 1)))["train"]


def both(
    rows: Any, folder: Path, views: int = 2, max_minutes: float | None = None
) -> tuple[InstanceDataset, CachedViews, M2FModel]:
    """The samples as they are and with kept maps, and the model."""
    categories = categories_of(rows)
    model = tiny_model(categories=[vars(one) for one in categories]).train()
    set_tuning(model, "frozen")
    plain = InstanceDataset(rows, TrainTransform(64, 64, color_jitter=0.4, copy_paste=0.5), categories)
    arguments = Arguments(str(folder), torch.device("cpu"), max_minutes=max_minutes)
    return plain, with_cached_maps(plain, model, views, arguments), model


def loss_of(model: M2FModel, dataset: InstanceDataset) -> Tensor:
    torch.manual_seed(0)
    loss: Tensor = model(**collate([dataset[index] for index in range(len(dataset))])).loss
    return loss


def test_the_loss_is_that_without_the_cache_up_to_the_maps_rounding(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "cpu_is_faster_in_bf16", lambda: False)
    plain, kept, model = both(rows, tmp_path)
    encoder, compute = model.encoder, model.encoder.backbone_features
    for epoch in range(2):
        plain.set_epoch(epoch)
        kept.set_epoch(epoch)
        exact, found = loss_of(model, plain), loss_of(model, kept)
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)
        with monkeypatch.context() as patch:
            patch.setattr(
                encoder, "backbone_features", lambda pixels: [one.bfloat16().float() for one in compute(pixels)]
            )
            rounded = loss_of(model, plain)
        torch.testing.assert_close(found, rounded, rtol=1e-6, atol=0)


def test_a_cpu_that_is_faster_in_bfloat16_computes_the_maps_in_it(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "cpu_is_faster_in_bf16", lambda: True)
    _, kept, model = both(rows, tmp_path)
    pixels, mask = (kept[0][name].unsqueeze(0) for name in ("pixel_values", "pixel_mask"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model.encoder.backbone_features(model.normalise(pixels, mask))
    for found, one in zip(kept[0]["backbone_maps"], wanted, strict=True):
        torch.testing.assert_close(found, one[0].bfloat16(), rtol=2e-2, atol=2e-2)


def test_a_data_worker_at_another_view_does_not_change_what_this_one_reads(
    rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = InstanceDataset(rows, TrainTransform(64, 64, color_jitter=0.4), categories_of(rows))
    alone = []
    for index, view in ((index, view) for index in range(3) for view in range(3)):
        dataset.set_epoch(view)
        alone.append(dataset[index]["pixel_values"])
    monkeypatch.setattr(dataset, "_epoch", torch.tensor(2))  # shared memory, which the other has just written
    monkeypatch.setattr(dataset, "set_epoch", lambda _: None)
    found = AllViews(dataset, 3, slice(None))
    assert [torch.equal(found[record]["pixel_values"], alone[record]) for record in range(9)] == [True] * 9


def test_in_training_the_backbone_does_not_run_no_image_is_read_and_views_come_round(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kept, model = both(rows, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the backbone ran, or an image was decoded")

    monkeypatch.setattr(model.encoder.backbone, "forward", refuse)
    monkeypatch.setattr(kept.dataset, "sample", refuse)
    losses = []
    for epoch in range(4):
        kept.set_epoch(epoch)
        losses.append(loss_of(model, kept).item())
    assert losses[0] == losses[2] != losses[1] == losses[3]


def test_features_of_tiles_are_kept_for_each_view_of_a_tile(rows: Any, tmp_path: Path) -> None:
    categories = categories_of(rows)
    model = tiny_model(categories=[vars(one) for one in categories]).train()
    set_tuning(model, "frozen")
    plain = TrainTiles(rows, TileTransform(64, 64, 48, flip=False), categories, limit=2)
    kept = with_cached_maps(plain, model, 3, Arguments(str(tmp_path), torch.device("cpu")))
    assert len(kept) == len(plain) == 6
    written = kept.maps.path(0).stat().st_mtime_ns
    resumed = TrainTiles(rows, TileTransform(64, 64, 48, flip=False), categories, limit=2)
    again = with_cached_maps(resumed, model, 3, Arguments(str(tmp_path), torch.device("cpu")))
    assert again.maps == kept.maps
    assert again.maps.path(0).stat().st_mtime_ns == written, "a resumed run reads what is there"
    for epoch in (1, 2, 4):
        plain.set_epoch(epoch % 3)
        kept.set_epoch(epoch)
        torch.testing.assert_close(loss_of(model, kept), loss_of(model, plain), rtol=1e-2, atol=0)


def test_a_cache_that_is_there_is_read_and_one_of_other_settings_is_made_anew(
    rows: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _, first, _ = both(rows, tmp_path)
        assert "3 images x 2 views x 0.0205 MB = 0.000123 GB of backbone maps and pixels go to" in caplog.text
        written = first.maps.path(0).stat()
        assert written.st_size == first.maps.size
        both(rows, tmp_path)
        assert first.maps.path(0).stat().st_mtime_ns == written.st_mtime_ns
        _, third, _ = both(rows, tmp_path, views=3)
    assert third.maps.path(0).stat().st_size == written.st_size // 2 * 3
    assert not first.maps.path(0).exists()


def test_everything_that_the_features_depend_on_makes_them_anew(rows: Any, tmp_path: Path) -> None:
    """The layers that the neck reads, how pixels are normalised and read, and the image files themselves."""
    folder = tmp_path / "data"
    (photo, *_) = (write_sample(folder, images=(3, 1, 1)) / "train").glob("*.[jp][pn]g")
    categories = [vars(one) for one in categories_of(rows)]
    four = {**VIT, "num_hidden_layers": 4}

    def keys(model: M2FModel, **reading: Any) -> str:
        rows = load_coco(folder, cache_dir=tmp_path / "cache", **reading)["train"]
        return cache_key(InstanceDataset(rows, TrainTransform(64, 64), categories_of(rows)), model)

    first = tiny_model(four, categories=categories, taps=(1, 4))
    other = tiny_model(four, categories=categories, taps=(2, 4))
    other.load_state_dict(first.state_dict())
    found = [keys(first), keys(first), keys(other), keys(first, pixel_range=(0.0, 4095.0))]
    first.config.image_mean = [0.5, 0.5, 0.5]
    found.append(keys(first))
    os.utime(photo, ns=(1, 1))
    found.append(keys(first))
    assert found[0] == found[1]
    assert len(set(found)) == 5


def test_tiles_that_are_in_no_view_are_counted(rows: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    categories = categories_of(rows)
    model = tiny_model(categories=[vars(one) for one in categories])
    tiles = TrainTiles(rows, TileTransform(64, 64, 48, flip=False), categories, limit=1)
    filled = np.count_nonzero(tiles.grid.counts)
    assert len(tiles) == 3 < filled
    with caplog.at_level(logging.WARNING):
        with_cached_maps(tiles, model, 1, Arguments(str(tmp_path), torch.device("cpu")))
    assert f"feature_cache 1: {filled - 3} of {filled} tiles are never trained on" in caplog.text
    caplog.clear()
    whole = TrainTiles(rows, TileTransform(64, 64, 48, flip=False), categories)
    with caplog.at_level(logging.WARNING):
        with_cached_maps(whole, model, 1, Arguments(str(tmp_path), torch.device("cpu")))
    assert "never trained on" not in caplog.text


def test_the_whole_model_is_moved_to_the_device_of_the_run(rows: Any, tmp_path: Path) -> None:
    """The pixels are normalised there too."""
    categories = categories_of(rows)
    given = InstanceDataset(rows, TrainTransform(64, 64), categories), tiny_model(categories=[vars(categories[0])])
    with Waits():
        kept = with_cached_maps(*given, 1, Arguments(str(tmp_path), DEVICE))
        assert {tensor.device for tensor in (*given[1].parameters(), *given[1].buffers())} == {DEVICE}
    assert kept.maps.path(0).stat().st_size == kept.maps.size


@pytest.mark.gpu
def test_features_are_computed_on_a_gpu(rows: Any, tmp_path: Path) -> None:
    categories = categories_of(rows)
    model = tiny_model(categories=[vars(one) for one in categories]).eval()
    samples = InstanceDataset(rows, TrainTransform(64, 64), categories)
    host = with_cached_maps(samples, model, 1, Arguments(str(tmp_path / "cpu"), torch.device("cpu")))
    gpu = with_cached_maps(samples, model, 1, Arguments(str(tmp_path / "gpu"), torch.device("cuda", 0)))
    for one, other in zip(host.maps.read(0), gpu.maps.read(0), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_a_long_computation_tells_how_far_it_is(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both(rows, tmp_path)
    assert "feature_cache" not in capsys.readouterr().out  # nothing is said in the first seconds
    monkeypatch.setattr(feature_cache, "FIRST_LINE", 0.0)
    monkeypatch.setattr(feature_cache, "OTHER_LINES", 0.0)
    both(rows, tmp_path, views=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" views")[0] for line in lines] == [f"feature_cache: {done} of 9" for done in range(1, 10)]
    assert lines[-1].endswith(" s/view, 00:00 left")


def test_a_full_disk_is_an_error_before_anything_is_computed(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = namedtuple("disk", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    with pytest.raises(DataError, match=r"feature_cache 2: 3 images x 2 views .* do not fit .*Lower feature_cache"):
        both(rows, tmp_path)


def test_a_cache_that_takes_more_than_half_of_the_runs_minutes_is_refused_early(rows: Any, tmp_path: Path) -> None:
    """3 x 20,000 views in 0.3 s would be 5 microseconds each."""
    with pytest.raises(RecipeError, match=r"feature_cache 20000: .* half of max_minutes, which is 0\.01\. They would"):
        both(rows, tmp_path, views=20_000, max_minutes=0.01)
    assert list((tmp_path / "feature_cache").iterdir()) == []
    _, kept, _ = both(rows, tmp_path, views=2, max_minutes=60)
    assert kept.maps.path(0).stat().st_size == kept.maps.size


def test_a_refused_cache_leaves_the_former_one_and_a_new_one_replaces_it(rows: Any, tmp_path: Path) -> None:
    _, former, _ = both(rows, tmp_path, views=2)
    (tmp_path / "feature_cache" / ".maps-killed-0.bf16").touch()
    with pytest.raises(RecipeError, match="half of max_minutes"):
        both(rows, tmp_path, views=20_000, max_minutes=0.01)
    _, kept, _ = both(rows, tmp_path, views=2)
    assert kept.maps == former.maps, "they are computed only once"
    _, new, _ = both(rows, tmp_path, views=3)
    assert {path.name for path in (tmp_path / "feature_cache").iterdir()} == {
        "maps.json", new.maps.path(0).name, new.maps.samples_path(0).name
    }  # fmt: skip


def test_the_former_cache_goes_first_where_the_disk_has_no_room_for_both(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(rows, tmp_path, views=2)
    usage, size = shutil.disk_usage, sum(path.stat().st_size for path in (tmp_path / "feature_cache").iterdir())

    def small_disk(folder: Path) -> Any:
        used = sum(path.stat().st_size for path in folder.iterdir())
        return usage(folder)._replace(total=0, free=2 * size - used)

    monkeypatch.setattr("shutil.disk_usage", small_disk)
    _, new, _ = both(rows, tmp_path, views=3)
    assert new.maps.path(0).is_file()


def test_the_time_of_the_cache_is_measured_after_the_first_batch(tmp_path: Path) -> None:
    """The first of six batches of four takes 10 s, each other one 2 s: half a second a view, 12 s for 24 views."""
    seconds = [0.0]
    maps = MapFiles(tmp_path, "maps", images=4, views=6, shapes=((1, 1, 1),), frame=(8, 6), parts=1)

    def records() -> Iterator[tuple[list[Tensor], bytes]]:
        for place in range(24):
            seconds[0] += 0 if place % 4 else 2 if place else 10
            yield [], b""

    def written(minutes: float) -> int:
        seconds[0] = 0
        return len(list(within_minutes(records(), maps, minutes, lambda: seconds[0])))

    assert written(0.4) == 24
    with pytest.raises(RecipeError) as refused:
        written(0.3)
    assert str(refused.value).endswith(
        "They would take 0.2 minutes, by the 0.5 s/view of the first ones. Set feature_cache to 4 or 0, or max_minutes "
        "to 0.4 or more."
    )
    with pytest.raises(RecipeError, match=r"Set feature_cache to 0, or max_minutes to 0\.4 or more\."):
        written(0.03)
    assert seconds == [12.0], "after the second batch"


def test_maps_written_are_maps_read(tmp_path: Path) -> None:
    files = MapFiles(tmp_path, "maps", images=2, views=2, shapes=((4, 6, 5), (8, 3, 3)), frame=(8, 6), parts=3)
    records = [[torch.randn(shape) for shape in files.shapes] for _ in range(4)]
    samples = [{**sample_of(0), "image_id": number} for number in range(4)]
    packed = [(maps, pack_sample(sample)) for maps, sample in zip(records, samples, strict=True)]
    for part in range(3):
        files.write(part, packed[part::3])
    for record, maps in enumerate(records):
        for found, expected in zip(files.read(record), maps, strict=True):
            assert torch.equal(found, expected.bfloat16())
        assert files.read_sample(record)["image_id"] == record


def test_maps_that_cannot_be_written_are_an_error_and_leave_no_file(tmp_path: Path) -> None:
    files = MapFiles(tmp_path, "maps", images=1, views=1, shapes=((1, 2, 2),), frame=(8, 6), parts=1)

    def full_disk() -> Iterator[tuple[list[Tensor], bytes]]:
        yield [torch.zeros(1, 2, 2)], b"sample"
        raise OSError(ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"feature_cache: .*maps-0.bf16 can't be written \(.*No space left on device"):
        files.write(0, full_disk())
    assert list(tmp_path.iterdir()) == []


def fill_as_rank(rank: int, data: Path, folder: Path) -> None:
    """A rank of two that share a folder."""
    sys.stderr = (folder / f"{rank}.log").open("w", buffering=1)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    _, kept, _ = both(load_coco(data)["train"], folder / "run")
    torch.save([kept.maps.read(record) for record in range(6)], folder / f"{rank}.pt")
    leave()


def test_ranks_that_share_a_folder_write_a_file_each_and_read_all(tmp_path: Path) -> None:
    """On a network file system, nodes that write one file together overwrite each other's parts."""
    data = write_sample(tmp_path / "data", images=(3, 1, 1))
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=fill_as_rank, args=(rank, data, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0, 0]
    sizes = [path.stat().st_size for path in (tmp_path / "run" / "feature_cache").glob("*.bf16")]
    torch.manual_seed(0)
    _, alone, _ = both(load_coco(data)["train"], tmp_path / "alone")
    assert sizes == [alone.maps.size // 2] * 2
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for record in range(6):
            for one, expected in zip(found[record], alone.maps.read(record), strict=True):
                torch.testing.assert_close(one, expected, rtol=2e-2, atol=2e-2)
    torch.manual_seed(0)
    _, again, _ = both(load_coco(data)["train"], tmp_path / "run")
    assert again.maps.parts == 2, "one process reads what two have written"


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_backbone_that_trains_has_no_cache(tmp_path: Path, tune: str) -> None:
    with pytest.raises(RecipeError, match=f"feature_cache=2 stores .* a frozen backbone, but tune={tune} changes"):
        load_recipe([str(write_tiny(tmp_path, tune=tune, feature_cache=2))])


def test_a_run_with_a_cache_ends_with_a_model_and_without_the_cache(tmp_path: Path) -> None:
    figures = train(load_recipe([str(write_tiny(tmp_path, tune="frozen", feature_cache=2, max_steps=2))]))
    assert "eval_map" in figures
    assert (tmp_path / "run/model.safetensors").is_file()
    assert not (tmp_path / "run/feature_cache").exists()


@pytest.mark.parametrize(
    ("ending", "longer"),
    [
        ({"max_steps": 2}, {"max_steps": 3}),
        ({"max_steps": -1, "num_train_epochs": 1}, {"num_train_epochs": 2}),
        ({"max_steps": -1, "max_minutes": 0.01}, {}),
        ({"max_steps": 4, "early_stopping_patience": 1, "learning_rate": 0.0}, {"early_stopping_patience": 3}),
    ],
    ids=["steps", "epochs", "minutes", "patience"],
)
def test_a_finished_run_that_is_resumed_computes_no_features(
    ending: dict[str, Any], longer: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"tune": "frozen", "feature_cache": 2, "lr_scheduler_type": "constant", "checkpointing_steps": 1}
    recipe = [str(write_tiny(tmp_path, images=(4, 1, 0), **{**fields, **ending}))]
    computed = "of backbone maps and pixels go to"
    train(load_recipe(recipe))
    assert caplog.text.count(computed) == 1
    resumed = [*recipe, "--resume_from_checkpoint", "true"]
    train(load_recipe(resumed))
    assert caplog.text.count(computed) == 1
    if longer:
        options = {**longer, "allow_changes": True}
        train(load_recipe([*resumed, *(word for name in options for word in (f"--{name}", str(options[name])))]))
        assert caplog.text.count(computed) == 2, "a run that goes on needs them"
