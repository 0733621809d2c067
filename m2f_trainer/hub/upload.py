"""Upload a model folder to the Hugging Face Hub: only the listed files, with retries after temporary failures.

The token comes from the environment (HF_TOKEN) or `hf auth login`, never from an argument. A file that contains it is
not uploaded.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, validate_repo_id  # type: ignore[attr-defined]

from m2f_trainer.errors import SharingError, missing_path
from m2f_trainer.evaluation.gallery import PICTURE, draw_pictures, rows_of_run
from m2f_trainer.hub.licences import TERMS, Origin, agreements, legal_text, licence_chain
from m2f_trainer.hub.markdown import without_folders
from m2f_trainer.hub.model_card import CARD, CardOptions, is_untouched, render_card, write_card
from m2f_trainer.model import mask2former
from m2f_trainer.model.mask2former import M2FConfig, M2FModel
from m2f_trainer.run_folder import PICTURES, load_run, read_details, read_json, write_atomically
from m2f_trainer.version import __version__

RETRY_DELAYS = (1.0, 4.0)  # seconds
TIMEOUT = 120.0  # seconds without a byte from the Hub; huggingface_hub itself has no timeout

MODEL_FILES = {
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
    *(terms.agreement for terms in TERMS.values() if terms.agreement),
}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MODEL_CODE = {path.name: path for path in (Path(__file__).parents[1] / "model").glob("*.py")}
OWN_CLASSES = {f"{mask2former.__name__.rpartition('.')[2]}.{one.__name__}" for one in (M2FConfig, M2FModel)}
LEGAL_FILES = ("LICENSE", "NOTICE", "DINOV3_LICENSE.md")


@dataclass(frozen=True)
class Target:
    """Where to upload to, and which parts of the model.

    Attributes:
        repo_id: name/model on the Hub.
        private: make a new repository private; refuse a public one.
        revision: a branch to commit to, created if it doesn't exist.
        pull_request: open a pull request instead of committing; the repository must exist.
        adapter_only: upload the LoRA adapter, neck and head, without the backbone's own weights.
        pictures: show validation images in the card, annotation beside prediction; by default no image is uploaded.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    pull_request: bool = False
    adapter_only: bool = False
    pictures: bool = False

    @property
    def card_options(self) -> CardOptions:
        """The options of the model card for this target."""
        return CardOptions(self.repo_id, self.pictures, self.adapter_only)


def push(folder: str | Path, target: Target | str) -> str:
    """Upload a model with its card and licences to the Hub; return the address of the repository or pull request.

    The folder gets the card, the DINOv3 agreement where it is required, and the pictures where they are requested.

    Raises:
        SharingError: the upload is not possible or failed; the message says what to do.
    """
    folder, target = Path(folder), Target(target) if isinstance(target, str) else target
    check_model(folder, target.adapter_only)
    if not get_token():
        raise SharingError("No Hub token found: set the environment variable HF_TOKEN or run `hf auth login`.")
    add_agreements(folder)
    if target.pictures:
        add_pictures(folder)
    add_card(folder, target.card_options)
    for wait in (*RETRY_DELAYS, None):
        try:
            return upload_files(folder, target)
        except SharingError:
            raise
        except Exception as error:  # the HTTP library's errors differ between versions of huggingface_hub
            if wait is None or not is_transient(error):
                raise SharingError(failure_message(folder, target.repo_id, error)) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def planned_files(folder: str | Path, target: Target) -> list[tuple[str, int | None]]:
    """(path, bytes) of each file that `push` would upload; bytes is None for a file still to be written.

    Nothing is uploaded or written.

    Raises:
        SharingError: the folder holds no model, or the repository's name is invalid.
    """
    folder = Path(folder)
    check_model(folder, target.adapter_only)
    try:
        validate_repo_id(target.repo_id)
    except HFValidationError as error:
        raise SharingError(failure_message(folder, target.repo_id, error)) from error
    files = commit_operations(folder, target.adapter_only, target.pictures)
    sizes: dict[str, int | None] = {one.path_in_repo: one.upload_info.size for one in files}
    if card_is_generated(folder):
        sizes[CARD] = len(render_card(folder, target.card_options).encode())
    if target.pictures and not (folder / PICTURES).is_dir():
        sizes[f"{PICTURES}/"] = None
    for name in agreements(chain_of(folder)):
        sizes.setdefault(name, None)
    return sorted(sizes.items())


def check_model(folder: Path, adapter_only: bool = False) -> None:
    """Raise SharingError unless the folder holds a configuration and weights, or with `adapter_only` an adapter."""
    if problem := missing_path(folder):
        raise SharingError(f"{problem} Give a run's folder or one of its checkpoints.")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "config.json" not in present or not (adapter_only or any(name.endswith(".safetensors") for name in present)):
        raise SharingError(
            f"{folder} holds no model: expected config.json and model.safetensors, found "
            f"{', '.join(sorted(present)[:10]) or 'nothing'}. Give a run's folder or one of its checkpoints."
        )
    if adapter_only and not (folder / "adapter" / "adapter_model.safetensors").is_file():
        raise SharingError(
            f"{folder} holds no adapter: expected adapter/adapter_model.safetensors, which a run with --tune "
            "lora on a published backbone writes at its end. Give such a run's folder, or leave out --adapter_only."
        )


def add_agreements(folder: Path) -> None:
    """Copy the agreements beside the weights that licences of their origins require, such as DINOv3's.

    Raises SharingError if one can't be read.
    """
    for name, origin in agreements(chain_of(folder)).items():
        if not (folder / name).is_file():
            try:
                write_atomically(folder / name, read_agreement(origin.source, name))
            except Exception as error:
                raise SharingError(
                    f"The weights in {folder} derive from {origin.source}, and its licence ({origin.licence}) requires "
                    f"a copy of the agreement with them, which could not be fetched from {origin.source}. Save the "
                    f"text at {TERMS[origin.licence].link} as {folder / name} and push again."
                ) from error


def chain_of(folder: Path) -> list[Origin]:
    """The licence chain of a model's folder."""
    return licence_chain(read_json(folder / "config.json"))


def read_agreement(source: str, name: str) -> bytes:
    """The agreement that was published with a backbone, from its folder or its repository. Raises OSError."""
    path = Path(source)
    if not path.exists():
        return Path(hf_hub_download(source, "LICENSE.md")).read_bytes()
    beside = path if path.is_dir() else path.parent
    found = [beside / one for one in (name, "LICENSE.md") if (beside / one).is_file()]
    if not found:
        raise FileNotFoundError(f"no LICENSE.md in {beside}")
    return found[0].read_bytes()


def add_pictures(folder: Path) -> None:
    """Draw the card's pictures if the run has not. Raises SharingError if its dataset is not on this machine."""
    if (folder / PICTURES).is_dir():
        return
    rows = rows_of_run(load_run(folder))
    if rows is None:
        raise SharingError(
            f"{folder} has no {PICTURES}/, and the dataset that its recipe.json names is not on this machine, so they "
            "can't be drawn. Push without --pictures."
        )
    draw_pictures(folder, rows, read_details(folder))


def add_card(folder: Path, options: CardOptions) -> None:
    """Write the model card, unless a user has written or edited it."""
    if card_is_generated(folder):
        write_card(folder, options)


def card_is_generated(folder: Path) -> bool:
    """Whether the card may be (re)written: the folder has none, or an unedited one that m2f_trainer wrote."""
    card = folder / CARD
    return not card.is_file() or is_untouched(card.read_text(encoding="utf-8"))


def upload_files(folder: Path, target: Target) -> str:
    """One attempt: create the repository if needed and upload all files in one commit; return the address."""
    get_session().timeout = TIMEOUT
    api = HfApi(library_name="m2f_trainer")
    repo_id, message = target.repo_id, "Upload a model of m2f_trainer"
    files = commit_operations(folder, target.adapter_only, target.pictures)
    if target.pull_request:
        commit = api.create_commit(repo_id, files, commit_message=message, create_pr=True, revision=target.revision)
        return str(commit.pr_url)
    address = api.create_repo(repo_id, private=target.private or None, exist_ok=True)
    if target.private and not api.model_info(address.repo_id).private:
        raise SharingError(
            f"{repo_id} exists and is public, but --private was given. Make it private in its settings on the Hub, "
            "or choose another name."
        )
    if target.revision:
        api.create_branch(address.repo_id, branch=target.revision, exist_ok=True)
    api.create_commit(address.repo_id, files, commit_message=message, revision=target.revision)
    return str(address)


def commit_operations(folder: Path, adapter_only: bool = False, pictures: bool = False) -> list[CommitOperationAdd]:
    """The files to upload. Raises SharingError if one of them contains the token."""
    files = {path.relative_to(folder).as_posix(): upload_content(path) for path in model_files(folder, pictures)}
    if adapter_only:
        files = without_backbone(files)
    else:
        files |= own_code(folder)
    files |= {name: legal_text(name).encode() for name in LEGAL_FILES}
    token = (get_token() or "").encode()
    for name, value in files.items():
        if token and isinstance(value, bytes) and token in value:
            raise SharingError(f"{folder / name} holds your Hub token. Remove it, and create a new token on the Hub.")
    return [CommitOperationAdd(name, value) for name, value in sorted(files.items())]


def own_code(folder: Path) -> dict[str, bytes | str]:
    """The package's own code that a model's configuration refers to; nothing where it refers to none.

    Code files in the folder are not uploaded, since they may have been modified.

    Raises:
        SharingError: one of them differs from the package's, or the configuration refers to other code.
    """
    for name, own in MODEL_CODE.items():
        path = folder / name
        if path.is_file() and path.read_bytes() != own.read_bytes():
            raise SharingError(
                f"{path} differs from the code of m2f_trainer {__version__}, and whoever loads the model would run it. "
                "Delete the file: the package's own code is uploaded."
            )
    named = read_json(folder / "config.json").get("auto_map") or {}
    other = sorted(set(map(str, named.values())) - OWN_CLASSES) if isinstance(named, dict) else [str(named)]
    if other:
        raise SharingError(
            f"{folder / 'config.json'} refers to other code than m2f_trainer's: {other[0]}. Remove its auto_map."
        )
    return {name: path.read_bytes() for name, path in MODEL_CODE.items()} if named else {}


def model_files(folder: Path, pictures: bool) -> list[Path]:
    """The files of a folder that belong to the model, without its code. Symbolic links are left out."""
    below = [
        path for name in ("adapter", PICTURES) if not (folder / name).is_symlink() for path in folder.glob(f"{name}/*")
    ]
    files = [path for path in (*folder.iterdir(), *below) if path.is_file() and not path.is_symlink()]
    return [path for path in files if is_model_file(path.relative_to(folder).as_posix(), pictures)]


def is_model_file(name: str, pictures: bool) -> bool:
    """Whether a file belongs to the model, by its path in the folder; pictures only with `pictures`."""
    if PICTURE.fullmatch(name):
        return pictures
    return name in MODEL_FILES or SHARD.fullmatch(name) is not None


def upload_content(path: Path) -> bytes | str:
    """The path of a weights file, the bytes of any other file; absolute paths in JSON are cut to their last part."""
    if path.suffix == ".safetensors":
        return str(path)
    if path.name not in ("config.json", "recipe.json", "adapter_config.json"):
        return path.read_bytes()
    return (json.dumps(without_folders(read_json(path)), indent=2) + "\n").encode()


def without_backbone(files: dict[str, bytes | str]) -> dict[str, bytes | str]:
    """The files without weights; those of adapter/ are moved to the top, where peft looks for them."""
    kept = {name: value for name, value in files.items() if not name.startswith("adapter/")}
    kept = {
        name: value for name, value in kept.items() if not name.endswith((".safetensors", ".safetensors.index.json"))
    }
    return kept | {name.removeprefix("adapter/"): files[name] for name in files if name.startswith("adapter/")}


def is_transient(error: Exception) -> bool:
    """Whether a retry may succeed: after server errors and broken connections, not after a refusal or a bad name."""
    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled | ValueError | FileNotFoundError)


def failure_message(folder: Path, repo_id: str, error: Exception) -> str:
    """The message of a failed upload: the error, its cause and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    steps = {
        401: "The token is not accepted: create a new one on the Hub and set HF_TOKEN.",
        403: f"The token may not write to {repo_id}: give it write access, or choose a name of your own.",
        404: f"{repo_id} can't be found or created: check the name before the slash.",
    }
    if isinstance(error, OfflineModeIsEnabled):
        step = "HF_HUB_OFFLINE is set: unset it to upload."
    else:
        step = steps.get(status or 0, f"The model is safe in {folder}: try again with m2f push {folder} {repo_id}.")
    cause = f" ({first_line(error.__cause__)})" if isinstance(error, RuntimeError) and error.__cause__ else ""
    return f"Uploading {folder} to {repo_id} failed: {first_line(error)}{cause}. {step}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
