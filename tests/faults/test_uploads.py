"""A Hub that fails at the end of a run: the run says so, and its result stays. (More in tests/hub.)"""

import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from huggingface_hub import constants

from m2f_trainer.hub import upload
from m2f_trainer.model.mask2former import load_model
from tests.faults.tiny import CANARY, Started, at_step, options, stop_self, train
from tests.hub.loopback import CUT, SILENT, Hub


def send_to(address: str) -> None:
    """Have uploads of this process go to a Hub of ours, without waits between tries."""
    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = address, True
    upload.time.sleep = lambda _: None  # type: ignore[assignment, attr-defined]


@pytest.mark.parametrize("fault", [500, pytest.param(CUT, marks=pytest.mark.slow)])
def test_a_hub_that_fails_ends_the_run_with_a_status_and_leaves_its_result(
    fault: int, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    fields = {"max_steps": 2, "push_to_hub": True, "hub_model_id": "me/pets"}
    with Hub() as hub:
        hub.failures["/commit/"] = [fault] * 100
        ran = train(tmp_path / "log", options(data, output, **fields), partial(send_to, hub.address), HF_TOKEN=CANARY)
    assert ran.status == 1, ran.text[-3000:]
    message = ran.text.split("m2f train: ")[-1]
    assert message.startswith(f"Uploading {output} to me/pets failed: ")
    assert f"The model is safe in {output}: try again with m2f push {output} me/pets" in message
    assert {"model.safetensors", "metrics.json", "README.md", "checkpoint-2"} <= {
        path.name for path in output.iterdir()
    }
    load_model(str(output))
    assert not hub.files
    assert hub.objects, "the weights arrived before the commit failed"
    assert CANARY not in ran.text
    assert not any(CANARY.encode() in body for body in hub.bodies)


def tell_of_the_group() -> None:
    """Say whether the process group is open when the card's pictures are drawn."""
    patch(
        "m2f_trainer.training.run.illustrate", lambda *_: sys.stderr.write(f"group open: {dist.is_initialized()}\n")
    ).start()


def test_no_rank_waits_for_pictures_card_and_upload(data: Path, tmp_path: Path) -> None:
    arguments = options(data, tmp_path / "run", per_device_train_batch_size=1, max_steps=2)
    ran = Started(tmp_path / "log", arguments, tell_of_the_group, ranks=2).join()
    assert [one.status for one in ran] == [0, 0], ran[0].text[-3000:]
    assert "group open: False" in ran[0].text
    assert (tmp_path / "run" / "README.md").is_file()


def test_no_rank_waits_for_the_upload_of_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """The Hub answers after the run has saved its last checkpoint, and the first is still there to be uploaded."""
    fields = {"per_device_train_batch_size": 1, "max_steps": 4, "ddp_timeout": 20, "save_total_limit": 1}
    fields |= {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": "me/pets"}
    with Hub() as hub:
        hub.failures["/commit/"] = [SILENT]
        arguments = options(data, tmp_path / "run", **fields)
        run = Started(tmp_path / "log", arguments, partial(send_to, hub.address), ranks=2, HF_TOKEN=CANARY)
        run.wait_for("step 4 is not uploaded: step 2 still is.")
        hub.released.set()
        ran = run.join()
    assert [one.status for one in ran] == [0, 0], ran[0].text[-3000:]
    assert sum("/commit/" in path for _, path in hub.requests) == 3, "one without answer, step 2 and the final model"
    assert "failed" not in ran[0].text


def test_a_run_that_stops_names_the_upload_that_it_breaks_off(data: Path, tmp_path: Path) -> None:
    fields = {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": "me/pets"}
    with Hub() as hub:
        hub.failures["/commit/"] = [SILENT]
        arguments = options(data, tmp_path / "run", **fields)
        run = Started(tmp_path / "log", arguments, partial(stop_at_save, hub.address), HF_TOKEN=CANARY)
        (ran,) = run.join()
    assert ran.status == 75, ran.text[-3000:]
    assert "step 2: the run ends before the checkpoint is uploaded." in ran.text


def stop_at_save(address: str) -> None:
    """As `send_to`, and send a signal to this process in step 2, which is saved."""
    send_to(address)
    at_step(1, stop_self)
