"""No token in any file or log, and no code of a checkpoint that runs."""

import contextlib
import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest

from m2f_trainer.model.mask2former import load_model
from m2f_trainer.training.checkpointing.checkpoints import write_manifest
from tests.faults.tiny import CANARY, options, train

LOADED = [
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "model.safetensors", "training_args.bin",
    "scaler.pt", "optimizer.bin",
]  # fmt: skip


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return partial(Path.touch), (self.path,)  # type: ignore[return-value]


def test_the_token_is_in_no_file_and_no_log(whole: Path) -> None:
    files = [path for path in whole.parent.rglob("*") if path.is_file()]
    assert {"whole.log.0", "whole.json", "model.safetensors"} <= {path.name for path in files}
    assert len(files) > 20
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert not [path for path in files if path.name == "training_args.bin"]


def test_a_token_in_the_recipe_is_refused(data: Path, tmp_path: Path) -> None:
    ran = train(tmp_path / "log", options(data, tmp_path / "run", hub_token=CANARY))
    assert ran.status == 1
    assert CANARY not in ran.text


def boom(name: str, data: Path, whole: Path, folder: Path) -> None:
    output, mark = folder / "run", folder / "boom"
    shutil.copytree(whole / "checkpoint-4", output / "checkpoint-4")
    bomb = output / "checkpoint-4" / name
    bomb.write_bytes(pickle.dumps(Bomb(mark)))
    pickle.loads(bomb.read_bytes())
    assert mark.exists()
    mark.unlink()
    write_manifest(output / "checkpoint-4")
    train(folder / "log", options(data, output, resume_from_checkpoint=True))
    with contextlib.suppress(Exception):  # it may well refuse
        load_model(str(output / "checkpoint-4"))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt"])
def test_a_pickle_bomb_does_not_go_off(name: str, data: Path, whole: Path, tmp_path: Path) -> None:
    boom(name, data, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_no_pickle_bomb_goes_off(name: str, data: Path, whole: Path, tmp_path: Path) -> None:
    boom(name, data, whole, tmp_path)


@pytest.mark.parametrize("key", ["auto_map", "architectures"])
def test_code_named_in_a_config_does_not_run(key: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole / "checkpoint-4", folder)
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'boom')!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config[key] = {"AutoConfig": "evil.C", "AutoModel": "evil.M"} if key == "auto_map" else ["evil.M"]
    (folder / "config.json").write_text(json.dumps(config))
    load_model(str(folder))
    assert not (tmp_path / "boom").exists()
