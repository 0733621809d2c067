"""Every shipped recipe, and every command and table in recipes/README.md, holds."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from m2f_trainer.config.arguments import DataArguments, ModelArguments
from m2f_trainer.config.recipe import load_recipe, save_recipe
from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.model.build import build_model
from m2f_trainer.model.mask2former import load_model
from tests.training.runs import write_tiny

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.json"))
PUBLISHED = [path for path in RECIPES if path.name.startswith("dinov3_")]
SCRIPTS = sorted((ROOT / "recipes").glob("*.sh"))
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
FIELDS = {one.name for group in (ModelArguments, DataArguments, TrainArguments) for one in fields(group)}


def name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_loads_and_survives_saving(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe([str(path), "--dataset_name", "coco"])
    save_recipe(recipe, tmp_path / "saved.json")
    assert load_recipe([str(tmp_path / "saved.json")]) == recipe


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
def test_a_published_recipe_has_sixteen_images_per_step_and_their_learning_rate(path: Path) -> None:
    recipe = load_recipe([str(path), "--dataset_name", "coco"])
    train = recipe.train
    if "vitl" in path.name:  # whose batch depends on the memory
        sizes = {train.per_device_train_batch_size, train.gradient_accumulation_steps, train.learning_rate}
        assert sizes == {"auto"}, "16 images, and 1e-4 for them, see tests/training/test_auto.py"
    else:
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 16
        assert train.learning_rate == 1e-4
    assert recipe.model.num_queries == (200 if "vitl" in path.name else 100)
    assert train.output_dir == f"runs/{path.stem}"
    assert recipe.model.head_checkpoint is None, "the published heads are CC BY-NC: the user's choice, not a default"


def test_the_quickstart_model_is_small_and_needs_no_download() -> None:
    recipe = load_recipe(["quickstart", "--dataset_name", "sample"])
    assert isinstance(recipe.model.backbone_config, dict)
    assert isinstance(recipe.model.head_config, dict)
    model = build_model(
        recipe.model.backbone_config,
        [{"id": 1, "name": "disc"}],
        image_size=(recipe.data.image_height, recipe.data.image_width),
        num_queries=recipe.model.num_queries,
        **recipe.model.head_config,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000


def test_the_table_of_recipes_lists_every_one() -> None:
    listed = set(re.findall(r"^\| `([\w.]+\.json)`", README, flags=re.MULTILINE))
    assert listed == {path.name for path in RECIPES}


@pytest.mark.parametrize("command", re.findall(r"^m2f train .*$", README, flags=re.MULTILINE))
def test_a_command_of_the_readme_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    load_recipe(shlex.split(command)[2:])


def test_options_of_the_original_script_lead_to_fields_that_exist_or_to_advice() -> None:
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \| .*\|$", README, flags=re.MULTILINE)
    assert len(rows) >= 20
    for original, ours in rows:
        new = [word for word in re.findall(r"`(\w+)`", ours) if "m2f" not in word]
        assert set(new) <= FIELDS, ours
        for option in re.findall(r"--(\w+)", original):
            if option not in FIELDS or option == "hub_token":
                with pytest.raises(RecipeError, match=f"Unknown option --{option}.*: (use|leave|set|give)|HF_TOKEN"):
                    load_recipe([f"--{option}", "x"])


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_a_launch_script_parses_and_asks_for_what_is_missing(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    run = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("usage: ")


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("torchrun_single_node.sh", ["2"], "--standalone --max-restarts 3 --nproc_per_node 2 -m m2f_trainer train"),
        (
            "torchrun_multi_node.sh",
            [],
            "--nnodes 2 --nproc_per_node 8 --max-restarts 3 --rdzv_backend c10d --rdzv_endpoint a:1",
        ),
    ],
)
def test_a_launch_script_hands_the_recipe_to_torchrun(
    script: str, arguments: list[str], expected: str, tmp_path: Path
) -> None:
    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    run = subprocess.run(
        ["bash", str(ROOT / "recipes" / script), *arguments, "r.json", "--seed", "1"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "NODES": "2", "GPUS": "8", "HEAD": "a:1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in run.stdout
    assert run.stdout.endswith("-m m2f_trainer train r.json --seed 1\n")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments", "machines"), [("single_node", ["2"], 1), ("multi_node", [], 2)])
def test_the_processes_of_a_launch_script_train_one_model(
    script: str, arguments: list[str], machines: int, tmp_path: Path
) -> None:
    """Two processes: of one machine, or of two that are this one."""
    recipe = write_tiny(tmp_path, per_device_train_batch_size=1)
    command = ["bash", str(ROOT / "recipes" / f"torchrun_{script}.sh"), *arguments, str(recipe)]
    python = str(Path(sys.executable).parent)
    variables = {"NODES": "2", "GPUS": "1", "HEAD": f"127.0.0.1:{free_port()}", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}
    started = [subprocess.Popen(command, env=environment, cwd=tmp_path) for _ in range(machines)]
    assert [one.wait(500) for one in started] == [0] * machines
    facts = json.loads((tmp_path / "run" / "checkpoint-4" / "fingerprint.json").read_text())
    assert facts["world_size"] == 2
    assert load_model(str(tmp_path / "run")).config.num_queries == 10


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(("ending", "requeued"), [(75, True), (1, False), (0, False)])
def test_a_slurm_job_is_queued_again_exactly_when_the_run_was_saved_for_it(
    ending: int, requeued: bool, tmp_path: Path
) -> None:
    stand_ins = {
        "srun": '[ "$2" = --cpus-per-task=9 ] || exit 99; shift 2; SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=4 "$@"',
        "scontrol": "case $1 in show) echo first; echo second;; requeue) echo requeued $2;; esac",
        "python": f'echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT "$@"; exit {ending}',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "9"}
    run = subprocess.run(
        ["bash", str(ROOT / "recipes" / "slurm.sh"), "r.json", "--name", "two words"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    first, *rest = run.stdout.splitlines()
    assert first == "1 1 4 2 first 20007 -m m2f_trainer train r.json --name two words --resume_from_checkpoint auto"
    assert rest == (["requeued 7"] if requeued else [])
    assert run.returncode == ending
