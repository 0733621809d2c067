"""Uploads through the real huggingface_hub client to a Hub on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2f_trainer.errors import SharingError
from m2f_trainer.hub import upload
from m2f_trainer.hub.model_card import write_card
from tests.hub.folder import write_model
from tests.hub.loopback import CUT, HALF_HEARD, LATE, SILENT, STALLED, TOKEN, TRICKLE, Hub, hub_of_this_process
from tests.model.tiny import tiny_model

AGREEMENT = "DINOV3_AGREEMENT.md"
DINOV3 = {"backbone_name": "dinov3-vits16plus", "backbone_config": {"model_type": "dinov3_vit"}}
UPLOADED = {
    "DINOV3_LICENSE.md",
    "LICENSE",
    "NOTICE",
    "README.md",
    "config.json",
    "metrics.json",
    "model.safetensors",
    "preprocessor_config.json",
    "recipe.json",
    *upload.MODEL_CODE,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that uploads of this process go to."""
    with hub_of_this_process(monkeypatch) as server:
        yield server


def command(hub: Hub, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`m2f push` in a fresh process, where huggingface_hub takes its address from the environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = str(Path(argv[0]).parent / "hf_home")
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": home, **variables}
    return subprocess.run(
        [sys.executable, "-m", "m2f_trainer", "push", *argv],
        env={**inherited, **own},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_uploads_a_model_with_card_and_licences_and_nothing_else(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    with Hub() as hub:
        run = command(hub, str(folder), "me/pets")
    assert run.returncode == 0, run.stderr
    assert f"Uploaded to {hub.address}/me/pets" in run.stdout
    assert "m2f predict me/pets IMAGES" in run.stdout
    assert set(hub.files) == UPLOADED
    assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"m2f predict me/pets photos/" in hub.files["README.md"]
    assert not any(b"stays here" in body for body in hub.bodies)
    assert f"Bearer {TOKEN}" in hub.tokens, "the token travels in the header alone"
    assert not any(TOKEN.encode() in body for body in hub.bodies)
    assert TOKEN not in run.stdout + run.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_offline_mode_is_reported(tmp_path: Path) -> None:
    with Hub() as hub:
        run = command(hub, str(write_model(tmp_path / "run")), "me/pets", HF_HUB_OFFLINE="1")
    assert run.returncode == 1
    assert run.stderr.startswith("m2f push: Uploading ")
    assert "HF_HUB_OFFLINE is set: unset it" in run.stderr
    assert not hub.requests


def test_weights_from_dinov3_are_uploaded_with_the_agreement(tmp_path: Path) -> None:
    with Hub() as hub:
        hub.agreement = b"the agreement"
        run = command(hub, str(write_model(tmp_path / "run", **DINOV3)), "me/pets")
    assert run.returncode == 0, run.stderr
    assert set(hub.files) == UPLOADED | {AGREEMENT}
    assert hub.files[AGREEMENT] == b"the agreement"
    assert b"Built with DINOv3" in hub.files["README.md"]


def test_weights_from_dinov3_are_not_uploaded_without_the_agreement(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise OSError("gated")

    monkeypatch.setattr(upload, "hf_hub_download", refuse)
    with pytest.raises(SharingError, match=f"run/{AGREEMENT} and push again"):
        upload.push(write_model(tmp_path / "run", **DINOV3), "me/pets")
    assert not hub.requests


def test_paths_of_local_folders_are_not_uploaded(hub: Hub, tmp_path: Path) -> None:
    backbone = {"model_type": "dinov2", "_name_or_path": "/home/someone/vit", "odd": [["/home/someone"]]}
    upload.push(write_model(tmp_path / "run", init_from=str(tmp_path / "older"), backbone_config=backbone), "me/pets")
    assert json.loads(hub.files["recipe.json"])["dataset_name"] == "pets"
    assert json.loads(hub.files["config.json"])["backbone_config"]["_name_or_path"] == "vit"
    assert json.loads(hub.files["config.json"])["init_from"] == "older"
    assert not any(b"/home/someone" in body or str(tmp_path).encode() in body for body in hub.bodies)


def test_a_link_in_the_folder_is_not_followed(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    (tmp_path / "passwords").write_text("secret")
    (folder / "matching.py").symlink_to(tmp_path / "passwords")
    upload.push(folder, "me/pets")
    assert set(hub.files) == UPLOADED


def test_an_adapter_is_uploaded_too(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/someone/base"}')
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"low rank")
    upload.push(folder, "me/pets")
    assert set(hub.files) == UPLOADED | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert b"/home/someone" not in hub.files["adapter/adapter_config.json"]


def test_pictures_of_the_data_are_uploaded_only_on_request(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    (folder / "pictures").mkdir()
    for name in ("worst_1.jpg", "best_1.jpg", "private.jpg"):
        (folder / "pictures" / name).write_bytes(b"a patient")
    upload.push(folder, "me/pets")
    assert set(hub.files) == UPLOADED
    assert not any(b"a patient" in body for body in hub.bodies)
    target = upload.Target("me/pets", pictures=True)
    expected = UPLOADED | {"pictures/worst_1.jpg", "pictures/best_1.jpg"}
    assert {name for name, _ in upload.planned_files(folder, target)} == expected
    upload.push(folder, target)
    assert set(hub.files) == expected


def test_pictures_that_cannot_be_drawn_raise_an_error_before_any_upload(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    (folder / "evaluation.json").write_text('{"shown": {"worst": []}, "classes": []}')
    with pytest.raises(SharingError, match=r"has no pictures/.*Push without --pictures"):
        upload.push(folder, upload.Target("me/pets", pictures=True))
    assert not hub.requests


def test_an_edited_card_is_kept_and_an_unedited_one_is_rewritten(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    write_card(folder)
    upload.push(folder, "me/pets")
    assert b"m2f predict me/pets photos/" in hub.files["README.md"]
    (folder / "README.md").write_text("mine")
    upload.push(folder, "me/pets")
    assert hub.files["README.md"] == b"mine"


def test_a_private_upload_creates_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    hub.private = True
    upload.push(write_model(tmp_path / "run"), upload.Target("me/pets", private=True))
    assert hub.created[0]["visibility"] == "private"


def test_a_private_upload_into_a_public_repository_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SharingError, match="me/pets exists and is public"):
        upload.push(write_model(tmp_path / "run"), upload.Target("me/pets", private=True))
    assert not hub.files


@pytest.mark.parametrize("fault", [500, CUT, HALF_HEARD])
@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/objects/batch", "/upload/", "/commit/"])
def test_a_temporary_failure_is_retried(
    hub: Hub, tmp_path: Path, path: str, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload.time, "sleep", lambda _: None)
    hub.failures[path] = [fault, fault]
    upload.push(write_model(tmp_path / "run"), "me/pets")
    assert set(hub.files) == UPLOADED


@pytest.mark.parametrize("fault", [500, CUT, HALF_HEARD])
@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/upload/", "/commit/"])
def test_a_lasting_failure_is_reported_and_leaves_no_partial_model(
    hub: Hub, tmp_path: Path, path: str, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a Hub has taken in part appears in no repository: the files come with one commit, or not at all."""
    monkeypatch.setattr(upload.time, "sleep", lambda _: None)
    folder = write_model(tmp_path / "run")
    write_card(folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "README.md"}
    hub.failures[path] = [fault] * 100
    with pytest.raises(SharingError, match=r"Uploading .*/run to me/pets failed: .* try again with m2f push "):
        upload.push(folder, "me/pets")
    assert not hub.files
    assert not any(b"stays here" in body for body in hub.bodies)
    assert before == {file: file.read_bytes() for file in before}
    hub.failures.clear()
    upload.push(folder, "me/pets")
    assert set(hub.files) == UPLOADED, "the same command ends it later"


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "create a new one"), (403, "may not write to me/pets"), (404, "check the name before the slash")],
)
def test_a_refusal_is_reported_at_once_with_advice(hub: Hub, tmp_path: Path, status: int, message: str) -> None:
    hub.failures["/api/"] = [status] * 20
    with pytest.raises(SharingError, match=message):
        upload.push(write_model(tmp_path / "run"), "me/pets")
    assert len([path for _, path in hub.requests if path == "/api/repos/create"]) == 1


def test_an_invalid_repository_name_is_reported(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SharingError, match=r"Uploading .* to me/a/b failed: "):
        upload.push(write_model(tmp_path / "run"), "me/a/b")
    assert not hub.files


def test_without_a_token_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "get_token", lambda: None)
    with pytest.raises(SharingError, match="set the environment variable HF_TOKEN or run `hf auth login`"):
        upload.push(write_model(tmp_path / "run"), "me/pets")


def test_a_file_that_holds_the_token_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "run", backbone_name=TOKEN)
    monkeypatch.setattr(upload, "get_token", lambda: TOKEN)
    with pytest.raises(SharingError, match=r"config\.json holds your Hub token"):
        upload.commit_operations(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "."])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "absent" if missing == "." else write_model(tmp_path / "run")
    (folder / missing).unlink(missing_ok=True)
    message = r"holds no model: expected config\.json and model\.safetensors, found"
    message = r"no such file or folder.* Give a run's folder" if missing == "." else message
    with pytest.raises(SharingError, match=message):
        upload.push(folder, "me/pets")


@pytest.mark.parametrize("pace", [LATE, TRICKLE])
def test_a_slow_hub_gets_each_request_once(hub: Hub, tmp_path: Path, pace: int) -> None:
    paths = ("/api/repos/create", "/preupload/", "/objects/batch", "/upload/", "/commit/")
    hub.failures = {path: [pace] for path in paths}
    upload.push(write_model(tmp_path / "run"), "me/pets")
    assert set(hub.files) == UPLOADED
    assert not any(hub.failures.values())
    assert [sum(path in asked for _, asked in hub.requests) for path in paths] == [1] * len(paths)


@pytest.mark.parametrize(
    ("path", "fault"),
    [("/api/repos/create", SILENT), ("/preupload/", STALLED), ("/upload/", SILENT), ("/commit/", STALLED)],
)
def test_a_hub_that_stops_answering_times_out(
    hub: Hub, tmp_path: Path, path: str, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload.time, "sleep", lambda _: None)
    monkeypatch.setattr(upload, "RETRY_DELAYS", ())
    monkeypatch.setattr(upload, "TIMEOUT", 0.4)
    hub.failures[path] = [fault] * 100
    with pytest.raises(SharingError, match=r"me/pets failed: .*timed out.* try again with m2f push "):
        upload.push(write_model(tmp_path / "run"), "me/pets")
    assert len(hub.failures[path]) < 100
    assert set(hub.files) == (UPLOADED if path == "/commit/" else set()), "of a commit only the answer was lost"


def test_a_failed_connection_is_reported_with_the_command_to_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, waits = write_model(tmp_path / "run"), []

    def fail(*_: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(upload, "get_token", lambda: TOKEN)
    monkeypatch.setattr(upload, "upload_files", fail)
    monkeypatch.setattr(upload.time, "sleep", waits.append)
    with pytest.raises(SharingError, match=r"no route to host\. The model is safe in .*: try again with m2f push "):
        upload.push(folder, "me/pets")
    assert waits == list(upload.RETRY_DELAYS)


def test_a_dry_run_lists_the_files_and_uploads_nothing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run", **DINOV3)
    before = {path.name for path in folder.iterdir()}
    with Hub() as hub:
        run = command(hub, str(folder), "me/pets", "--dry_run", HF_TOKEN="")
        assert run.returncode == 0, run.stderr
        assert not hub.requests
    listed = dict(reversed(line.split("  ", 1)) for line in map(str.strip, run.stdout.splitlines()))
    assert set(listed) == UPLOADED | {AGREEMENT}
    assert listed["model.safetensors"] == f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert listed[AGREEMENT] == "to be written"
    assert {path.name for path in folder.iterdir()} == before


def test_a_dry_run_refuses_a_name_that_the_hub_would_refuse(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    with pytest.raises(SharingError, match="bad name!"):
        upload.planned_files(folder, upload.Target("me/bad name!"))


def test_a_revision_is_created_and_a_pull_request_commits_nothing(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    upload.push(folder, upload.Target("me/pets", revision="second"))
    paths = [path for _, path in hub.requests]
    assert "/api/models/me/pets/branch/second" in paths
    assert "/api/models/me/pets/commit/second" in paths
    hub.requests.clear()
    address = upload.push(folder, upload.Target("them/pets", pull_request=True))
    assert address.endswith("/discussions/1")
    assert not [path for _, path in hub.requests if "repos/create" in path or "branch" in path]


def test_adapter_only_uploads_the_adapter_without_the_backbone(hub: Hub, tmp_path: Path) -> None:
    folder, target = write_model(tmp_path / "run"), upload.Target("me/pets", adapter_only=True)
    with pytest.raises(SharingError, match=r"holds no adapter: expected adapter/adapter_model\.safetensors"):
        upload.push(folder, target)
    (folder / "adapter").mkdir()
    for name in ("config.json", "adapter_config.json"):
        (folder / "adapter" / name).write_text('{"adapter": true}')
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"low rank")
    upload.push(folder, target)
    own = {"config.json", "adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.files) == UPLOADED - {"model.safetensors", *upload.MODEL_CODE} | own
    assert json.loads(hub.files["config.json"]) == {"adapter": True}


def test_the_agreement_comes_from_the_backbones_own_folder(hub: Hub, tmp_path: Path) -> None:
    backbone = tmp_path / "dinov3"
    backbone.mkdir()
    changes = DINOV3 | {"backbone_name": str(backbone)}
    with pytest.raises(SharingError, match=r"could not be fetched from .*dinov3\. Save the text at"):
        upload.push(write_model(tmp_path / "run", **changes), "me/pets")
    (backbone / "LICENSE.md").write_text("as it came")
    upload.push(write_model(tmp_path / "run", **changes), "me/pets")
    assert hub.files[AGREEMENT] == b"as it came"


LOAD = """
import sys, torch
from m2f_trainer import load_model
pixels = torch.arange(3 * 64 * 64).reshape(1, 3, 64, 64).remainder(255).to(torch.uint8)
first, second = (load_model(name)(pixel_values=pixels) for name in sys.argv[1:])
print(torch.equal(first.masks_queries_logits, second.masks_queries_logits), first.masks_queries_logits.shape)
"""


def test_a_pushed_model_loads_by_its_id_and_gives_the_same_outputs(hub: Hub, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "run")
    upload.push(tmp_path / "run", "me/pets")
    own = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "run"), "me/pets"],
        env={**os.environ, **own}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout.startswith("True"), run.stderr[-2000:]
