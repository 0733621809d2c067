"""The command listens, answers, and stops in order."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m2f_trainer.cli.main import main
from tests.model.tiny import tiny_model
from tests.serve.loopback import ask, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved model."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


def test_a_stopped_server_answers_what_it_has_received_and_exits_with_0(model: Path) -> None:
    command = [sys.executable, "-m", "m2f_trainer", "serve", str(model), "--port", "0", "--max_wait", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"tiny answers at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C stops it\)\n", line)
            assert found, line
            port = int(found[1])
            with ThreadPoolExecutor(3) as pool:
                answers = [pool.submit(ask, port, "POST", "/instances", picture()) for _ in range(3)]
                while b"m2f_open_requests 3.0" not in ask(port, "GET", "/metrics").body:
                    if all(answer.done() for answer in answers):
                        break
                process.send_signal(signal.SIGTERM)
                assert [answer.result().status for answer in answers] == [200, 200, 200]
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output) == (0, "Stopped: all requests are answered.\n")
    assert "Traceback" not in errors


def test_an_address_in_use_is_an_error_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "some/model-on-the-hub", "--port", str(port)]) == 1
    assert "Address already in use" in capsys.readouterr().err
