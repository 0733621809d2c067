"""The `m2f` command: quick help, errors without tracebacks, and the next step at each end."""

import io
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import m2f_trainer.hub
from m2f_trainer.cli import main as cli
from m2f_trainer.cli import options as cli_options
from m2f_trainer.errors import DataError

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


def test_help_takes_under_a_second_and_imports_neither_torch_nor_transformers() -> None:
    code = "import sys; from m2f_trainer.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = python(code + "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))").splitlines()[-1]
    assert heavy == "set()"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "m2f_trainer", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "m2f_trainer", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()  # before anything is written: imports take seconds
        assert run.stderr.read() == b""


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
    assert f"examples:\n  m2f {command} " in text
    assert command in cli_options.ABOUT


def test_the_help_of_train_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--help"])
    assert "--head_checkpoint" in capsys.readouterr().out


def test_a_wrong_recipe_gives_one_message_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--bakcbone", "x"]) == 1
    assert capsys.readouterr().err.startswith(
        "m2f train: Unknown option --bakcbone on the command line: the nearest is"
    )


def test_the_model_packages_own_error_is_advice_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from m2f_trainer.model.backbones import ModelError

    def fail(*_: object) -> None:
        raise ModelError("no such model")

    monkeypatch.setitem(cli.COMMANDS, "evaluate", fail)
    assert cli.main(["evaluate", "a", "b"]) == 1
    assert capsys.readouterr().err == "m2f evaluate: no such model\n"


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "evaluate", fail)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["evaluate", "a", "b"])


def test_what_the_system_refuses_is_told_with_the_file_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "evaluate", lambda *_: (tmp_path / "file" / "scores").mkdir(parents=True))
    (tmp_path / "file").touch()
    assert cli.main(["evaluate", "a", "b"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("m2f evaluate: ")
    assert str(tmp_path / "file") in error


def test_names_that_the_outputs_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setitem(cli.COMMANDS, "evaluate", lambda *_: cli.say("Z\u00fcge \u5217\u8eca \udce9"))
    assert cli.main(["evaluate", "a", "b"]) == 0
    assert written.getvalue().decode("cp1252").strip() == "Z\u00fcge \\u5217\\u8eca \\udce9"


@pytest.mark.parametrize(
    "argv",
    [
        "predict m in --batch_size 0", "predict m in --tile -5", "evaluate m d --batch_size -1", "export m --images 0",
        "check d --preview 0", "check d --num_queries 0", "check d --image_height x",
    ],
)  # fmt: skip
def test_a_count_below_one_is_wrong_usage(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv.split())
    assert "expected a whole number from 1 on, got" in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "evaluate", stop)
    assert cli.main(["evaluate", "a", "b"]) == 130


def test_an_unknown_option_of_another_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "a", "b", "--batchsize", "3"])
    assert "evaluate takes no --batchsize; see m2f evaluate --help" in capsys.readouterr().err


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))  # type: ignore[misc]


def test_train_hands_over_the_recipe_and_names_the_next_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    stand_in(monkeypatch, "m2f_trainer.training.run", train=seen.append)
    argv = ["train", "--dataset_name", "my coco", "--output_dir", "runs/a", "--seed", "7"]
    assert cli.main(argv) == 0
    assert seen[0].train.seed == 7
    assert capsys.readouterr().out.endswith("Next:\n  m2f evaluate runs/a 'my coco'\n  m2f predict runs/a IMAGES\n")


def test_evaluate_prints_the_figures_and_the_next_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def evaluate_folder(*values: object) -> dict[str, float]:
        seen.append(values)
        return {"eval_map": 0.5, "eval_map_class/cat": 0.25}

    stand_in(monkeypatch, "m2f_trainer.training.evaluate", evaluate_folder=evaluate_folder)
    assert cli.main(["evaluate", "runs/a", "coco", "--split", "test"]) == 0
    assert seen == [("runs/a", "coco", "test", None, 4)]
    out = capsys.readouterr().out
    assert "masks       50.0" in out
    assert "cat        25.0" in out
    assert out.endswith("  m2f predict runs/a IMAGES\n")


def test_predict_and_push_and_demo_hand_over_their_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    record = lambda *values, **named: seen.append((*values, *named.values()))  # noqa: E731
    stand_in(monkeypatch, "m2f_trainer.inference.predict", predict_folder=record, Options=dict)
    target = lambda *values, **named: (*values, *named.values())  # noqa: E731
    stand_in(monkeypatch, "m2f_trainer.hub.upload", push=record, Target=target)
    monkeypatch.delattr(m2f_trainer.hub, "upload", raising=False)
    stand_in(monkeypatch, "m2f_trainer.training.demo", demo=record)
    assert cli.main(["predict", "m", "a.png", "b", "--recursive", "--threshold", "0.3", "--tile", "512"]) == 0
    assert cli.main(["push", "m", "me/m", "--private", "--revision", "draft"]) == 0
    assert cli.main(["demo", "--output_dir", "d", "--backbone", "dinov2-small"]) == 0
    options = {"threshold": 0.3, "recursive": True, "batch_size": 4, "tile": 512, "overlap": 0.2, "dataset": False}
    assert seen == [
        ("m", [Path("a.png"), Path("b")], Path("predictions"), options),
        (Path("m"), ("me/m", True, "draft", False, False, False)),
        (Path("d"), "dinov2-small", cli.say),
    ]
    assert capsys.readouterr().out.count("Next:\n  m2f ") == 3


def test_other_ranks_speak_only_of_their_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        cli.say("progress")
        raise DataError("broken")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setitem(cli.COMMANDS, "check", fail)
    assert cli.main(["check", "a"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "[rank 3] m2f check: broken\n")


@pytest.mark.parametrize("name", sorted(m2f_trainer.PUBLIC))
def test_every_public_name_loads_from_the_package(name: str) -> None:
    assert getattr(m2f_trainer, name).__name__ == name
    assert name in dir(m2f_trainer)


def test_a_name_that_is_not_public_lists_those_that_are() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'; public names: CocoMap, M2FTrainer"):
        _ = m2f_trainer.Trainer
