"""The `m2f` command: quick help, errors without tracebacks, exit statuses."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import m2f_trainer
from m2f_trainer.cli import main as cli
from m2f_trainer.config.cores import scheduled_cores
from m2f_trainer.errors import DataError
from tests.config.test_cores import system

ORDERS = {
    "transformers first": "import transformers, m2f_trainer.model",
    "the model first": "import m2f_trainer.model, transformers",
    "an Auto class first": "from transformers import AutoModelForUniversalSegmentation; import m2f_trainer.model",
    "a public name": "from m2f_trainer import Predictor",
    "the model's own module": "from m2f_trainer.model import mask2former",
}


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_help_takes_under_a_second_of_cpu_time_and_imports_nothing_heavy() -> None:
    code = "import sys; from m2f_trainer.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    before = os.times()
    heavy = python(code + "print({'torch', 'transformers', 'datasets', 'numpy', 'PIL'} & set(sys.modules))")
    after = os.times()
    assert heavy.splitlines()[-1] == "set()"
    assert after.children_user - before.children_user < 1


def test_a_closed_pipe_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "m2f_trainer", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()  # before anything is written: imports take seconds
        assert run.stderr.read() == b""


@pytest.mark.skipif(scheduled_cores() == 1, reason="a quota of one core is no limit on one core")
def test_under_a_cpu_quota_libraries_start_no_more_threads_than_it_grants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = "import torch; print(torch.get_num_threads())"
    root = system(tmp_path, "0::/\n", {"cpu.max": "80000 100000\n"})
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cli.limit_threads(root)
    assert python(threads) == "2", "what the user has set stands"
    monkeypatch.delenv("OMP_NUM_THREADS")
    cli.limit_threads(tmp_path / "no quota")
    assert "OMP_NUM_THREADS" not in os.environ
    cli.limit_threads(root)
    assert python(threads) == "1"


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_our_model_in_every_import_order(order: str) -> None:
    check = """
from transformers import AutoConfig, AutoModelForUniversalSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING as models
config = AutoConfig.for_model("mask2former_dino", backbone_config={"model_type": "dinov3_vit", "hidden_size": 8})
print(type(config).__name__, models[type(config)].__name__)
"""
    assert python(f"{ORDERS[order]}\n{check}") == "M2FConfig M2FModel"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "train":
        assert cli.main(["train", "--help"]) == 0
    else:
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert f"examples:\n  m2f {command}" in text


def test_the_overview_lists_every_command_with_its_summary() -> None:
    overview = cli.build_parser().format_help()
    for name, module in cli.COMMANDS.items():
        assert f"\n  {name:<10} {module.SUMMARY}\n" in overview


def test_a_model_error_is_printed_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from m2f_trainer.model.backbones import ModelError

    def fail(*_: object) -> None:
        raise ModelError("no such model")

    monkeypatch.setattr(cli.COMMANDS["evaluate"], "run", fail)
    assert cli.main(["evaluate", "a", "b"]) == 1
    assert capsys.readouterr().err == "m2f evaluate: no such model\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cli.COMMANDS["evaluate"], "run", fail)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["evaluate", "a", "b"])


def test_an_error_of_the_system_names_the_file_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli.COMMANDS["evaluate"], "run", lambda *_: (tmp_path / "file" / "scores").mkdir(parents=True))
    (tmp_path / "file").touch()
    assert cli.main(["evaluate", "a", "b"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("m2f evaluate: ")
    assert str(tmp_path / "file") in error


def test_characters_that_the_encoding_of_stdout_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr(cli.COMMANDS["evaluate"], "run", lambda *_: cli.say("Z\u00fcge \u5217\u8eca \udce9"))
    assert cli.main(["evaluate", "a", "b"]) == 0
    assert written.getvalue().decode("cp1252").strip() == "Z\u00fcge \\u5217\\u8eca \\udce9"


@pytest.mark.parametrize(
    "argv",
    [
        "predict m in --batch_size 0", "evaluate m d --batch_size -1", "export m --num_images 0",
        "check d --preview 0", "check d --num_queries 0", "check d --image_height x",
    ],
)  # fmt: skip
def test_a_count_below_one_is_wrong_usage(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv.split())
    assert "expected a whole number of at least 1, got" in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS["evaluate"], "run", stop)
    assert cli.main(["evaluate", "a", "b"]) == 130


def test_an_unknown_option_of_another_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "a", "b", "--batchsize", "3"])
    assert "evaluate takes no --batchsize; see m2f evaluate --help" in capsys.readouterr().err


def test_other_ranks_speak_only_of_their_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        cli.say("progress")
        raise DataError("broken")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli.COMMANDS["check"], "run", fail)
    assert cli.main(["check", "a"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "[rank 3] m2f check: broken\n")


@pytest.mark.parametrize("name", sorted(m2f_trainer.PUBLIC))
def test_every_public_name_loads_from_the_package(name: str) -> None:
    assert getattr(m2f_trainer, name).__name__ == name
    assert name in dir(m2f_trainer)


def test_a_name_that_is_not_public_lists_those_that_are() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'; public names: CocoMap, EvalTransform"):
        _ = m2f_trainer.Trainer
