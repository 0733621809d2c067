"""Which files of a model's folder go to the Hub, and as what: those on the list and no others."""

import json
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, get_token

from m2f_trainer.errors import SharingError
from m2f_trainer.evaluation.runs import read_json
from m2f_trainer.sharing.card import CARD
from m2f_trainer.sharing.licences import AGREEMENT, legal_text
from m2f_trainer.sharing.markdown import without_folders
from m2f_trainer.sharing.results import PICTURES

NAMED = {
    CARD,
    "config.json",
    "preprocessor_config.json",
    "recipe.json",
    "metrics.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter/config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    AGREEMENT,
}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MODEL_CODE = {path.name for path in (Path(__file__).parents[1] / "model").glob("*.py")}
LEGAL = ("LICENSE", "NOTICE", "DINOV3_LICENSE.md")
DRAWN = re.compile(rf"{PICTURES}/(worst|best)_\d\.jpg")


def operations(folder: Path, adapter_only: bool = False, pictures: bool = False) -> list[CommitOperationAdd]:
    """The files to upload. Raises SharingError when one of them holds the token."""
    files = {path.relative_to(folder).as_posix(): content(path) for path in allowed(folder, pictures)}
    if adapter_only:
        files = without_backbone(files)
    files |= {name: legal_text(name).encode() for name in LEGAL}
    token = (get_token() or "").encode()
    for name, value in files.items():
        if token and isinstance(value, bytes) and token in value:
            raise SharingError(f"{folder / name} holds your Hub token. Take it out, and make a new token on the Hub.")
    return [CommitOperationAdd(name, value) for name, value in sorted(files.items())]


def without_backbone(files: dict[str, bytes | str]) -> dict[str, bytes | str]:
    """The adapter's files moved to the top, where peft's tools look for them, and of the others card and figures."""
    kept = {name: value for name, value in files.items() if not name.startswith("adapter/")}
    for name in [name for name in kept if name.endswith(".safetensors.index.json") or name in MODEL_CODE]:
        del kept[name]
    kept = {name: value for name, value in kept.items() if not name.endswith(".safetensors")}
    return kept | {name.removeprefix("adapter/"): files[name] for name in files if name.startswith("adapter/")}


def allowed(folder: Path, pictures: bool) -> list[Path]:
    """The model's own files in a folder; links are left out, and so is any other code."""
    below = [
        path for name in ("adapter", PICTURES) if not (folder / name).is_symlink() for path in folder.glob(f"{name}/*")
    ]
    files = [path for path in (*folder.iterdir(), *below) if path.is_file() and not path.is_symlink()]
    return [path for path in files if is_allowed(path.relative_to(folder).as_posix(), pictures)]


def is_allowed(name: str, pictures: bool) -> bool:
    """Whether a file belongs to a model, by its path in the folder; pictures of its data only where asked for."""
    if DRAWN.fullmatch(name):
        return pictures
    return name in NAMED or name in MODEL_CODE or SHARD.fullmatch(name) is not None


def content(path: Path) -> bytes | str:
    """What to upload: the path of a large file, the bytes of a small one, and of JSON the bytes without local paths."""
    if path.suffix == ".safetensors":
        return str(path)
    if path.name not in ("config.json", "recipe.json", "adapter_config.json"):
        return path.read_bytes()
    return (json.dumps(without_folders(read_json(path)), indent=2) + "\n").encode()
