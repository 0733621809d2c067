"""Uploads a model's folder: the files on the list and no others, tried again where that helps.

The token comes from the environment (HF_TOKEN) or `hf auth login`. It is in no argument and no file, and a file that
holds it is not uploaded.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

from m2f_trainer.errors import SharingError
from m2f_trainer.evaluation.gallery import rows_of_run
from m2f_trainer.hub.licences import AGREEMENT, DINOV3, DINOV3_LINK, legal_text, licence_chain
from m2f_trainer.hub.markdown import without_folders
from m2f_trainer.hub.model_card import CARD, PICTURES, CardOptions, draw_pictures, is_untouched, render_card, write_card
from m2f_trainer.run_folder import read_details, read_json, read_run

WAITS = (1.0, 4.0)
PATIENCE = 120.0  # seconds without a byte from the Hub; huggingface_hub itself would wait for ever


@dataclass(frozen=True)
class Target:
    """Where an upload goes, and what of the model.

    Attributes:
        repo_id: name/model on the Hub.
        private: make a new repository private; refuse a public one.
        revision: a branch to commit to, made where it isn't there.
        pull_request: propose the files instead of committing them; the repository must be there.
        adapter_only: send the LoRA adapter, neck and head, and not the backbone's own weights.
        pictures: show validation images in the card, truth beside prediction; without it no image leaves the folder.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    pull_request: bool = False
    adapter_only: bool = False
    pictures: bool = False

    @property
    def card_options(self) -> CardOptions:
        """The card for it."""
        return CardOptions(self.repo_id, self.pictures, self.adapter_only)


def push(folder: str | Path, target: Target | str) -> str:
    """Upload a model with its card and licences to the Hub; return its address, or the pull request's.

    Raises SharingError with what to do; the folder stays as it is but for the card and the DINOv3 agreement.
    """
    folder, target = Path(folder), Target(target) if isinstance(target, str) else target
    check_model(folder, target.adapter_only)
    if not get_token():
        raise SharingError("No Hub token found: set the environment variable HF_TOKEN or run `hf auth login`.")
    add_agreement(folder)
    if target.pictures:
        add_pictures(folder)
    add_card(folder, target.card_options)
    for wait in (*WAITS, None):
        try:
            return send(folder, target)
        except SharingError:
            raise
        except Exception as error:  # the HTTP library's errors differ between versions of huggingface_hub
            if wait is None or not is_passing(error):
                raise SharingError(advice(folder, target.repo_id, error)) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def send(folder: Path, target: Target) -> str:
    """One try: the repository, then all files in one commit."""
    get_session().timeout = PATIENCE
    api = HfApi(library_name="m2f_trainer")
    repo_id, message = target.repo_id, "Upload a model of m2f_trainer"
    files = operations(folder, target.adapter_only, target.pictures)
    if target.pull_request:
        commit = api.create_commit(repo_id, files, commit_message=message, create_pr=True, revision=target.revision)
        return str(commit.pr_url)
    address = api.create_repo(repo_id, private=target.private or None, exist_ok=True)
    if target.private and not api.model_info(address.repo_id).private:
        raise SharingError(
            f"{repo_id} exists and is public, but --private was asked for. Make it private in its settings on the Hub, "
            "or choose another name."
        )
    if target.revision:
        api.create_branch(address.repo_id, branch=target.revision, exist_ok=True)
    api.create_commit(address.repo_id, files, commit_message=message, revision=target.revision)
    return str(address)


def listing(folder: str | Path, target: Target) -> list[tuple[str, int | None]]:
    """(path, bytes) of each file that `push` would send, without sending or writing any; None: not here yet.

    Raises SharingError as `push` for a folder without a model.
    """
    folder = Path(folder)
    check_model(folder, target.adapter_only)
    files = operations(folder, target.adapter_only, target.pictures)
    sizes: dict[str, int | None] = {one.path_in_repo: one.upload_info.size for one in files}
    if has_our_card(folder):
        sizes[CARD] = len(render_card(folder, target.card_options).encode())
    if target.pictures and not (folder / PICTURES).is_dir():
        sizes[f"{PICTURES}/"] = None
    if needs_agreement(folder):
        sizes.setdefault(AGREEMENT, None)
    return sorted(sizes.items())


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
    cause = f" ({first_line(error.__cause__)})" if isinstance(error, RuntimeError) and error.__cause__ else ""
    return f"Uploading {folder} to {repo_id} failed: {first_line(error)}{cause}. {step}"


def first_line(error: BaseException) -> str:
    """What an error says first; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def check_model(folder: Path, adapter_only: bool = False) -> None:
    """Raise SharingError unless the folder holds a configuration and weights, or an adapter where that is asked for."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "config.json" not in present or not (adapter_only or any(name.endswith(".safetensors") for name in present)):
        raise SharingError(
            f"{folder} holds no model: expected config.json and model.safetensors, found "
            f"{', '.join(sorted(present)[:10]) or 'nothing'}. Give a run's folder or one of its checkpoints."
        )
    if adapter_only and not (folder / "adapter" / "adapter_model.safetensors").is_file():
        raise SharingError(
            f"{folder} holds no adapter: expected adapter/adapter_model.safetensors, which a run with --tune "
            "lora leaves at its end. Give such a run's folder, or leave out --adapter_only."
        )


def add_card(folder: Path, options: CardOptions) -> None:
    """Write the card anew, unless someone has written one of their own."""
    if has_our_card(folder):
        write_card(folder, options)


def has_our_card(folder: Path) -> bool:
    """Whether the folder's card is ours to write: it has none, or one as it was written here."""
    card = folder / CARD
    return not card.is_file() or is_untouched(card.read_text(encoding="utf-8"))


def add_pictures(folder: Path) -> None:
    """Draw the card's pictures where the run has not. Raises SharingError where its dataset is not here."""
    if (folder / PICTURES).is_dir():
        return
    rows = rows_of_run(read_run(folder))
    if rows is None:
        raise SharingError(
            f"{folder} has no {PICTURES}/, and the dataset its recipe.json names is not here to draw them from. Push "
            "without --pictures."
        )
    draw_pictures(folder, rows, read_details(folder))


def needs_agreement(folder: Path) -> list[str]:
    """The DINOv3 backbones that the weights derive from."""
    return [origin.source for origin in licence_chain(read_json(folder / "config.json")) if origin.licence == DINOV3]


def add_agreement(folder: Path) -> None:
    """Put the DINOv3 agreement beside weights that fall under it, as it asks. Raises SharingError without it."""
    sources, path = needs_agreement(folder), folder / AGREEMENT
    if not sources or path.is_file():
        return
    try:
        path.write_bytes(agreement_of(sources[0]))
    except Exception as error:
        raise SharingError(
            f"The weights in {folder} derive from DINOv3, and its licence asks for a copy of the agreement with them, "
            f"which could not be fetched from {sources[0]}. Save the text at {DINOV3_LINK} as {path} and push again."
        ) from error


def agreement_of(source: str) -> bytes:
    """The agreement as the backbone came with it, from its folder or its repository. Raises OSError without it."""
    if not Path(source).is_dir():
        return Path(hf_hub_download(source, "LICENSE.md")).read_bytes()
    found = [path for path in (Path(source, AGREEMENT), Path(source, "LICENSE.md")) if path.is_file()]
    if not found:
        raise FileNotFoundError(f"no LICENSE.md in {source}")
    return found[0].read_bytes()


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
