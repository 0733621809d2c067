"""AP by setting: python -m benchmarks.accuracy.tables TILES BACKBONE OUT [--table NAME ...] [--seeds 0 1]

Each row of a table is the recipe (tiles.json, or --recipe) with some fields changed, trained on TILES (made by
`benchmarks.accuracy.tiles`, or any dataset) once for each seed. Results in OUT are reused, so an interrupted command
can be repeated; rows with the same settings are trained once. Prints the tables as Markdown, and writes OUT/tables.json
and the AP curve of each table.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.accuracy.stock_example import train_example
from benchmarks.accuracy.stock_parts import PARTS
from benchmarks.measure import in_fresh_process, machine
from m2f_trainer.config.recipe import OptionParser, Recipe, load_recipe
from m2f_trainer.training.run import train
from m2f_trainer.viz.charts import line_chart, save_png

FIGURES = {"eval_map": "AP", "eval_map_50": "AP50", "eval_map_small": "small", "eval_map_medium": "medium"}


@dataclass(frozen=True)
class Row:
    """Options that change the base recipe. `stock`: parts taken from transformers, or "example" and a learning rate."""

    options: tuple[str, ...] = ()
    stock: tuple[str, ...] = ()


def _set(text: str = "") -> Row:
    return Row(tuple(text.split()))


LAST, FOUR = "--pyramid_taps 12", "--pyramid_taps 3 6 9 12"
TABLES: dict[str, dict[str, Row]] = {
    "backbone": {"pretrained": _set(), "random": Row(("--backbone_config", "RANDOM"))},
    "tune": {
        "frozen": _set(),
        "LoRA, rank 4": _set("--tune lora --lora_rank 4 --lora_alpha 8"),
        "LoRA, rank 16": _set("--tune lora"),
        "full, backbone at 0.1": _set("--tune full"),
    },
    "neck": {
        "plain": _set("--neck plain"),
        "pyramid": _set(f"--neck pyramid {LAST}"),
        "pyramid, 4 taps": _set(f"--neck pyramid {FOUR}"),
        "adapter": _set(LAST),
        "adapter, 4 taps": _set(FOUR),
    },
    "fixes": {
        "ours": _set(),
        "transformers' initialisation": Row(stock=("initialisation",)),
        "transformers' parameter groups": Row(stock=("groups",)),
        "transformers' post-processing": Row(stock=("postprocessing",)),
        "all three": Row(stock=("initialisation", "groups", "postprocessing")),
    },
    "ema": {"off": _set(), "0.99": _set("--ema_decay 0.99")},
    "lsj": {
        "none": _set("--lsj_min_scale 1 --lsj_max_scale 1"),
        "0.8 to 1.25": _set(),
        "0.5 to 1.5": _set("--lsj_min_scale 0.5 --lsj_max_scale 1.5"),
        "0.1 to 2": _set("--lsj_min_scale 0.1 --lsj_max_scale 2"),
    },
    "feature cache": {
        "off": _set(),
        "4 views": _set("--feature_cache 4"),
    },
    "feature cache, 100 tiles": {
        "off": _set("--max_train_samples 100"),
        "1 view": _set("--max_train_samples 100 --feature_cache 1"),
        "4 views": _set("--max_train_samples 100 --feature_cache 4"),
    },
    "precision": {"float32": _set(), "bfloat16": _set("--bf16 true --use_cpu true")},
    "example": {
        "ours": _set(),
        "the example, our learning rate": Row(stock=("example", "5e-4")),
        "the example, its learning rate": Row(stock=("example", "1e-5")),
    },
    "together": {
        "frozen, the last layer": _set(LAST),
        "frozen, 4 taps": _set(FOUR),
        "LoRA, 4 taps": _set(f"--tune lora {FOUR}"),
        "LoRA, 4 taps, no jitter": _set(f"--tune lora {FOUR} --lsj_min_scale 1 --lsj_max_scale 1"),
    },
}  # fmt: skip


def main() -> None:
    """Train the rows without a result, and print the tables."""
    arguments = _arguments()
    for row in (row for name in arguments.table for row in TABLES[name].values()):
        recipe_of(arguments, row, 0, arguments.out)  # reports an invalid row before the first training
    for seed in arguments.seeds:
        for name in arguments.table:
            for row in TABLES[name].values():
                once(arguments, row, seed)
    figures = {name: gather(arguments, name) for name in arguments.table}
    (arguments.out / "tables.json").write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
    for name, rows in figures.items():
        print(f"\n## {name}\n\n{to_markdown(rows)}")
        save_png(curves(rows), arguments.out / f"{name}.png")


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("tiles", type=Path)
    made.add_argument("backbone", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--recipe", type=Path, default=Path(__file__).with_name("tiles.json"))
    made.add_argument("--table", nargs="+", default=list(TABLES), choices=list(TABLES))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    made.add_argument(
        "--steps", type=int, help="steps of every run; evaluated twice, at half and at the end [the recipe's]"
    )
    return made.parse_args()


def once(arguments: argparse.Namespace, row: Row, seed: int) -> Path:
    """The result file of one run, which is trained if the file is absent."""
    key = json.dumps([settings(arguments, row), row.stock], sort_keys=True)
    folder = arguments.out / f"{hashlib.sha256(key.encode()).hexdigest()[:10]}-{seed}"
    path: Path = folder.with_suffix(".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(in_fresh_process(run, arguments, row, seed, folder)) + "\n")
        print(f"{path.name}: {' '.join([*row.options, *row.stock]) or 'base'}", flush=True)
    return path


def run(arguments: argparse.Namespace, row: Row, seed: int, folder: Path) -> dict[str, Any]:
    """Train once, in a fresh process; return the final figures, and AP over steps as `course`."""
    torch.set_num_threads(1)
    began = time.process_time()
    if row.stock[:1] == ("example",):
        recipe = settings(arguments, row)
        figures = train_example(recipe, arguments.tiles, arguments.backbone, folder, float(row.stock[1]), seed)
        evaluated = [{**figures, "step": recipe["max_steps"]}]
    else:
        with ExitStack() as stack:
            for part in row.stock:
                stack.enter_context(PARTS[part]())
            train(recipe_of(arguments, row, seed, folder))
        state = json.loads((folder / "trainer_state.json").read_text())
        evaluated = [entry for entry in state["log_history"] if "eval_map" in entry]
    return {
        "seed": seed,
        "cpu_minutes": (time.process_time() - began) / 60,
        "course": [[entry["step"], entry["eval_map"]] for entry in evaluated],
        **{name: evaluated[-1][name] for name in FIGURES},
    }


def settings(arguments: argparse.Namespace, row: Row) -> dict[str, Any]:
    """The recipe's fields, with those that the row and the command line replace."""
    return {**json.loads(arguments.recipe.read_text()), **OptionParser().given([*_steps(arguments), *row.options])}


def _steps(arguments: argparse.Namespace) -> list[str]:
    if not arguments.steps:
        return []
    return ["--max_steps", str(arguments.steps), "--checkpointing_steps", str(arguments.steps // 2)]


def recipe_of(arguments: argparse.Namespace, row: Row, seed: int, folder: Path) -> Recipe:
    """The recipe of one run."""
    given = [
        str(arguments.recipe), "--dataset_name", str(arguments.tiles), "--output_dir", str(folder), "--seed", str(seed),
        "--overwrite_output_dir", "true", *_steps(arguments),
    ]  # fmt: skip
    random = json.dumps(json.loads((arguments.backbone / "config.json").read_text()))
    options = [random if option == "RANDOM" else option for option in row.options]
    start = ["--backbone", str(arguments.backbone)] if "RANDOM" not in row.options else []
    return load_recipe([*given, *start, *options])


def gather(arguments: argparse.Namespace, table: str) -> dict[str, list[dict[str, Any]]]:
    """Row name -> its results, one for each seed."""
    return {
        name: [json.loads(once(arguments, row, seed).read_text()) for seed in arguments.seeds]
        for name, row in TABLES[table].items()
    }


def curves(rows: dict[str, list[dict[str, Any]]]) -> Figure:
    """A chart of mask AP over steps: one line for each row, the mean of its seeds."""
    courses = {
        row: [
            (step, statistics.mean(one["course"][k][1] for one in runs))
            for k, (step, _) in enumerate(runs[0]["course"])
        ]
        for row, runs in rows.items()
    }
    return line_chart({row: [(0, 0.0), *course] for row, course in courses.items()}, "step", "mask AP")


def to_markdown(rows: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each row: means over the seeds in percent, and the difference of each seed to the first row's."""
    first = next(iter(rows.values()))
    text = ["| | AP (each seed) | to the first row (each) | AP50 | small | medium | CPU minutes |", f"|{'---|' * 7}"]
    for name, runs in rows.items():
        values = [100 * one["eval_map"] for one in runs]
        gains = [value - 100 * base["eval_map"] for value, base in zip(values, first, strict=True)]
        shown = "" if runs is first else _with_each(gains, "+.1f")
        others = [f"{100 * mean(runs, figure):.1f}" for figure in list(FIGURES)[1:]]
        cells = [name, _with_each(values, ".1f"), shown, *others, f"{mean(runs, 'cpu_minutes'):.1f}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _with_each(values: Sequence[float], form: str) -> str:
    """The mean and each value: `mean (value, value)`."""
    return f"{statistics.mean(values):{form}} ({', '.join(format(value, form) for value in values)})"


def mean(runs: Sequence[dict[str, Any]], figure: str) -> float:
    """The mean of a figure over runs."""
    return statistics.mean(one[figure] for one in runs)


if __name__ == "__main__":
    main()
