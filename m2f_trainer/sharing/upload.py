"""Uploads a model's folder: the files on the list and no others, tried again where that helps.

The token comes from the environment (HF_TOKEN) or `hf auth login`. It is in no argument and no file, and a file that
holds it is not uploaded.
"""

import json
import re
import time
from pathlib import Path, PurePath

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from m2f_trainer.errors import SharingError
from m2f_trainer.sharing.card import CARD, read, render_card, write_card
from m2f_trainer.sharing.licences import AGREEMENT, DINOV3, DINOV3_LINK, legal_text, licence_chain

NAMED = {
    CARD,
    "config.json",
    "preprocessor_config.json",
    "recipe.json",
    "metrics.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    AGREEMENT,
}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MODEL_CODE = {path.name for path in (Path(__file__).parents[1] / "model").glob("*.py")}
LEGAL = ("LICENSE", "NOTICE", "DINOV3_LICENSE.md")
WAITS = (1.0, 4.0)


def push(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a model with its card and licences to the Hub; return its address.

    Raises SharingError with what to do; the folder stays as it is but for the card and the DINOv3 agreement.
    """
    folder = Path(folder)
    check_model(folder)
    if not get_token():
        raise SharingError("No Hub token found: set the environment variable HF_TOKEN or run `hf auth login`.")
    add_agreement(folder)
    add_card(folder, repo_id)
    for wait in (*WAITS, None):
        try:
            return send(folder, repo_id, private)
        except SharingError:
            raise
        except Exception as error:  # the HTTP library's errors differ between versions of huggingface_hub
            if wait is None or not is_passing(error):
                raise SharingError(advice(folder, repo_id, error)) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def send(folder: Path, repo_id: str, private: bool) -> str:
    """One try: the repository, then all files in one commit."""
    api = HfApi(library_name="m2f_trainer")
    address = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(address.repo_id).private:
        raise SharingError(
            f"{repo_id} exists and is public, but --private was asked for. Make it private in its settings on the Hub, "
            "or choose another name."
        )
    message = "Upload a model of m2f_trainer"
    api.create_commit(address.repo_id, operations=operations(folder), commit_message=message)
    return str(address)


def is_passing(error: Exception) -> bool:
    """Whether a later try may do better: server trouble and broken connections, but no refusal and no bad name."""
    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled | ValueError | FileNotFoundError)


def advice(folder: Path, repo_id: str, error: Exception) -> str:
    """What went wrong, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    steps = {
        401: "The token is not accepted: make a new one on the Hub and set HF_TOKEN.",
        403: f"The token may not write to {repo_id}: give it write access, or choose a name of your own.",
        404: f"{repo_id} can't be found or made: check the name before the slash.",
    }
    if isinstance(error, OfflineModeIsEnabled):
        step = "HF_HUB_OFFLINE is set: unset it to upload."
    else:
        step = steps.get(status or 0, f"The model is safe in {folder}: try again with m2f push {folder} {repo_id}.")
    cause = f" ({error.__cause__})" if isinstance(error, RuntimeError) and error.__cause__ else ""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return f"Uploading {folder} to {repo_id} failed: {first}{cause}. {step}"


def check_model(folder: Path) -> None:
    """Raise SharingError unless the folder holds a configuration and weights."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "config.json" not in present or not any(name.endswith(".safetensors") for name in present):
        raise SharingError(
            f"{folder} holds no model: expected config.json and model.safetensors, found "
            f"{', '.join(sorted(present)[:10]) or 'nothing'}. Give a run's folder or one of its checkpoints."
        )


def add_card(folder: Path, repo_id: str) -> None:
    """Write the card for this address, unless someone has written one of their own."""
    card = folder / CARD
    if not card.is_file() or card.read_text(encoding="utf-8") == render_card(folder):
        write_card(folder, repo_id)


def add_agreement(folder: Path) -> None:
    """Put the DINOv3 agreement beside weights that fall under it, as it asks. Raises SharingError without it."""
    sources = [origin.source for origin in licence_chain(read(folder / "config.json")) if origin.licence == DINOV3]
    path = folder / AGREEMENT
    if not sources or path.is_file():
        return
    try:
        path.write_bytes(Path(hf_hub_download(sources[0], "LICENSE.md")).read_bytes())
    except Exception as error:
        raise SharingError(
            f"The weights in {folder} derive from DINOv3, and its licence asks for a copy of the agreement with them, "
            f"which could not be fetched from {sources[0]}. Save the text at {DINOV3_LINK} as {path} and push again."
        ) from error


def operations(folder: Path) -> list[CommitOperationAdd]:
    """The files to upload. Raises SharingError when one of them holds the token."""
    files = {str(path.relative_to(folder)): content(path) for path in allowed(folder)}
    files |= {name: legal_text(name).encode() for name in LEGAL}
    token = (get_token() or "").encode()
    for name, value in files.items():
        if isinstance(value, bytes) and token in value:
            raise SharingError(f"{folder / name} holds your Hub token. Take it out, and make a new token on the Hub.")
    return [CommitOperationAdd(name, value) for name, value in sorted(files.items())]


def allowed(folder: Path) -> list[Path]:
    """The model's own files in a folder; links are left out, and so is any other code."""
    files = [
        path for path in (*folder.iterdir(), *folder.glob("adapter/*")) if path.is_file() and not path.is_symlink()
    ]
    return [path for path in files if is_allowed(path.relative_to(folder).as_posix())]


def is_allowed(name: str) -> bool:
    """Whether a file belongs to a model, by its path in the folder."""
    return name in NAMED or name in MODEL_CODE or SHARD.fullmatch(name) is not None


def content(path: Path) -> bytes | str:
    """What to upload: the path of a large file, the bytes of a small one, and of JSON the bytes without local paths."""
    if path.suffix == ".safetensors":
        return str(path)
    if path.name not in ("config.json", "recipe.json", "adapter_config.json"):
        return path.read_bytes()
    return (json.dumps(without_folders(read(path)), indent=2) + "\n").encode()


def without_folders(values: dict[str, object]) -> dict[str, object]:
    """The values with each absolute path cut to its last part: the world need not know your folders."""
    return {
        key: PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value
        for key, value in values.items()
    }
