"""Training arguments: what constructing them does not do, and the private parts of transformers that they rely on."""

import os
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from m2f_trainer.config.training_arguments import LOGGERS, TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.training.optimizer import build_optimizer
from tests.model.tiny import tiny_model

CONSTRUCT = """
import torch.distributed as dist
from m2f_trainer.config.training_arguments import TrainArguments
arguments = TrainArguments(use_cpu=True, report_to="none", ddp_timeout=60)
arguments.for_trainer()
assert not dist.is_initialized()
print("constructed", flush=True)
assert (arguments.world_size, arguments.process_index) == (2, int(__import__("os").environ["RANK"]))
assert dist.is_initialized() and arguments.device.type == "cpu"
dist.barrier()  # a rank that leaves while the other still connects makes that one fail
dist.destroy_process_group()
"""


def ranks(folder: Path, count: int, code: str = CONSTRUCT) -> list[subprocess.Popen[str]]:
    """Start the first ranks of two with this code, in the environment that torchrun gives them."""
    (folder / "construct.py").write_text(code)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(folder / "construct.py")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def free_port() -> str:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return str(store.port)


def test_constructing_starts_no_process_group_and_the_first_use_does(tmp_path: Path) -> None:
    for rank in ranks(tmp_path, 2):
        out, error = rank.communicate(timeout=240)
        assert (rank.returncode, out) == (0, "constructed\n"), error


def test_the_private_parts_of_transformers_are_as_we_override_them() -> None:
    assert isinstance(vars(TrainingArguments)["_setup_devices"], cached_property)
    assert isinstance(vars(TrainingArguments)["device"], property)
    assert "distributed_state" not in vars(TrainingArguments)


def test_the_device_is_transformers_own() -> None:
    assert TrainArguments(use_cpu=True, report_to="none").device == torch.device("cpu")
    assert TrainArguments(report_to="none").device == TrainingArguments(report_to="none").device


def test_a_process_without_a_launcher_uses_one_of_several_gpus_and_says_how_to_use_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With two, transformers' Trainer would wrap the model in `nn.DataParallel`, which splits the masks of a batch."""

    def sees_eight(arguments: TrainingArguments) -> torch.device:
        arguments._n_gpu = 8
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments._setup_devices, "func", sees_eight)
    monkeypatch.setattr("sys.argv", ["m2f", "train", "--dataset_name", "my pets"])
    arguments = TrainArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.start_process_group()
    assert arguments.n_gpu == 1
    assert "torchrun --nproc_per_node 8 -m m2f_trainer train --dataset_name 'my pets'" in caplog.text


@pytest.mark.parametrize("there", [True, False])
def test_a_machine_without_accelerator_uses_its_cpu_and_saves_no_such_choice(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saved recipe that asked for the CPU would train on the CPU of a machine with a GPU, too."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: there)
    arguments = TrainArguments(report_to="none")
    assert arguments.use_cpu is not there
    assert arguments.to_dict()["use_cpu"] is arguments.for_trainer().to_dict()["use_cpu"] is False
    assert TrainArguments(report_to="none", use_cpu=True).to_dict()["use_cpu"] is True


WAIT_IN_VAIN = """
import torch, torch.distributed as dist
from m2f_trainer.config.training_arguments import TrainArguments
TrainArguments(report_to="none", ddp_timeout=2).start_process_group()
if dist.get_rank() == 1:
    input()
dist.all_reduce(torch.ones(1))
"""


def test_ranks_on_cpus_wait_as_long_as_ddp_timeout(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, 2, WAIT_IN_VAIN)
    _, error = first.communicate(timeout=240)
    second.communicate("\n", timeout=240)
    assert first.returncode == 1
    assert "Timed out" in error or "timeout" in error


def test_full_determinism_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(RecipeError, match="full_determinism: torch has no deterministic backward of grid_sample"):
        TrainArguments(full_determinism=True)


def test_an_unknown_logger_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"report_to=wandbb: unknown logger; the nearest is wandb. Known: all, azure"):
        TrainArguments(report_to=["tensorboard", "wandbb"])


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_that_is_not_available_is_refused_with_what_it_needs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LOGGERS.keys() == INTEGRATION_TO_CALLBACK.keys(), "each logger of transformers has a row"
    arguments = TrainArguments(report_to=name)
    monkeypatch.setitem(LOGGERS, name, (lambda: True, ""))
    arguments.require_packages()
    monkeypatch.undo()
    _, remedy = LOGGERS[name]
    assert "pip install" in remedy or "environment variable" in remedy
    monkeypatch.setitem(LOGGERS, name, (lambda: False, remedy))
    with pytest.raises(RecipeError, match=f"report_to={name}: not available here; {remedy}. Or give other loggers"):
        arguments.require_packages()


def test_a_logger_of_an_uninstalled_package_is_found_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="report_to=clearml: not available here; pip install clearml"):
        TrainArguments(report_to="clearml").require_packages()


def test_a_backend_that_the_device_or_torch_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"ddp_backend=nccl: not available on CPUs; available: gloo.* Leave"):
        TrainArguments(report_to="none", use_cpu=True, ddp_backend="nccl").start_process_group()


def test_a_backend_means_nothing_to_a_process_without_others() -> None:
    arguments = TrainArguments(report_to="none", use_cpu=True, ddp_backend="gloo")
    assert arguments.world_size == 1
    assert arguments.ddp_backend == "gloo"


@pytest.mark.filterwarnings("default")  # torch's compiler warns at its own code
def test_a_compiler_that_fails_on_this_machine_is_refused() -> None:
    arguments = TrainArguments(report_to="none", torch_compile=True, torch_compile_backend="inducto")
    with pytest.raises(
        RecipeError, match=r"torch_compile with the backend inducto .* fails on this machine: .*inducto"
    ):
        arguments.require_packages()
    TrainArguments(report_to="none", torch_compile=True, torch_compile_backend="eager").require_packages()


@pytest.mark.parametrize("name", [one.value for one in OptimizerNames])
def test_an_optimizer_is_accepted_or_refused_with_the_package_that_it_needs(name: str) -> None:
    try:
        arguments = TrainArguments(optim=name, report_to="none", use_cpu=True)
    except RecipeError as error:
        message = str(error)
    else:
        message = ""
        build_optimizer(tiny_model(), arguments)
    assert not message or (message.startswith(f"optim={name}: ") and re.search("install|import", message))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which cores a process may use")
def test_a_process_that_may_use_one_core_gets_one_data_worker() -> None:
    """Batch systems and containers limit the cores of a process; torch warns of more workers than these."""
    code = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]);"
        "from m2f_trainer.config.training_arguments import TrainArguments;"
        "print(TrainArguments(use_cpu=True, report_to='none').dataloader_num_workers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "1"


def test_accelerate_launch_sets_the_precision_and_contradicts_no_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes its options, and those of its file, by the environment; accelerate follows that by itself."""
    rest = {"report_to": "none", "use_cpu": True}
    for asked, bf16, fp16 in (("no", False, False), ("bf16", True, False), ("fp16", False, True)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        arguments = TrainArguments(**rest)
        assert (arguments.bf16, arguments.fp16, arguments.mixed_precision) == (bf16, fp16, asked)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert TrainArguments(bf16=True, **rest).bf16, "no is also what it passes where nothing was asked"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert TrainArguments(bf16=True, **rest).mixed_precision == "bf16", "a precision of the recipe wins"
    for asked, own in (("bf16", {"bf16": False}), ("fp8", {"bf16": False})):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        with pytest.raises(RecipeError, match=f"ACCELERATE_MIXED_PRECISION={asked}, .* contradicts the recipe"):
            TrainArguments(**own, **rest)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP is set .* has no fsdp. Leave it out there, and give fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED is set .* has no deepspeed"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR, .* set torch_compile in the"),
    ],
)
def test_an_engine_that_only_accelerate_launch_asks_for_is_refused(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=message):
        TrainArguments(report_to="none", use_cpu=True)


@pytest.mark.parametrize(("larger", "mode"), [(True, "max"), (False, "min")])
def test_a_schedule_of_the_figures_follows_them_in_the_direction_of_the_best_model(larger: bool, mode: str) -> None:
    given = {"greater_is_better": larger, "report_to": "none", "use_cpu": True}
    for name in ("reduce_lr_on_plateau", "greedy"):
        arguments = TrainArguments(lr_scheduler_type=name, **given)
        assert arguments.schedule_kwargs(10) == {"mode": mode}
        own = TrainArguments(lr_scheduler_type=name, lr_scheduler_kwargs={"mode": "min", "patience": 0}, **given)
        assert own.schedule_kwargs(10) == {"mode": "min", "patience": 0}


def test_a_start_method_of_workers_has_no_effect_without_workers() -> None:
    rest = {"report_to": "none", "use_cpu": True, "dataloader_multiprocessing_context": "spawn"}
    assert TrainArguments(dataloader_num_workers=1, **rest).dataloader_multiprocessing_context == "spawn"
    assert TrainArguments(dataloader_num_workers=0, **rest).dataloader_multiprocessing_context is None


def test_a_run_that_resumes_itself_may_rewrite_its_head(tmp_path: Path) -> None:
    """A finished run that a scheduler starts again with `auto` has written it."""
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text("{}")
    given = {"save_head": str(tmp_path / "head"), "output_dir": str(tmp_path / "run"), "report_to": "none"}
    with pytest.raises(RecipeError, match="this folder holds a model already"):
        TrainArguments(resume_from_checkpoint="auto", **given)
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    assert TrainArguments(resume_from_checkpoint="auto", **given).save_head
