"""`python -m benchmarks.rivals` from the command line to the figure, with rivals that need no training."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.rivals.__main__ import main
from benchmarks.rivals.report import to_markdown
from benchmarks.rivals.running import planned, rate
from benchmarks.rivals.table import TABLE, rivals_of
from tests.benchmarks.dataset import square, write_squares

PERFECT = {"label": "Perfect", "adapter": "tests.benchmarks.perfect", "packages": [], "settings": {"size": 1}}


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    return write_squares(tmp_path / "squares", [square(1, 0, 0), square(2, 40, 40)])


def run(squares: Path, table: dict[str, Any], *options: str) -> Path:
    path, out = squares.parent / "table.json", squares.parent / "out"
    path.write_text(json.dumps(table), encoding="utf-8")
    main([str(squares), str(out), "--table", str(path), "--backbone", str(squares), *options])
    return out


def trainings(out: Path) -> list[str]:
    return [line for path in sorted(out.glob("runs/*/trainings.txt")) for line in path.read_text().splitlines()]


def test_every_budget_and_seed_becomes_a_result_and_a_figure(squares: Path) -> None:
    out = run(squares, {"perfect": PERFECT}, "--minutes", "1", "2", "--seeds", "0", "1")
    assert trainings(out) == ["1 0 None", "1 1 None", "2 0 None", "2 1 None"]
    results = json.loads((out / "rivals.json").read_text())["results"]
    assert [(one["minutes"], one["seed"]) for one in results] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    for one in results:
        assert one["figures"]["AP"] == pytest.approx(1)
        assert 0 < one["cpu_minutes"] < 1
        assert one["settings"] == {"size": 1}
        assert one["commands"][0].endswith("task.json")
        assert {"torch", "python"} <= set(one["versions"])
    text = (out / "rivals.md").read_text()
    assert "| Perfect | 1 | 2 | **100.0** (100.0, 100.0) | 100.0 |" in text
    with Image.open(out / "rivals.png") as picture:
        assert picture.width > 600
    later = [one | {"versions": one["versions"] | {"commit": name}} for one, name in zip(results, "abba", strict=True)]
    assert "commit a and b." in to_markdown(later, "command")


def test_a_finished_result_is_not_run_again_unless_its_settings_change(squares: Path) -> None:
    options = ("--minutes", "1", "--seeds", "0")
    run(squares, {"perfect": PERFECT}, *options)
    out = run(squares, {"perfect": {**PERFECT, "label": "Renamed"}}, *options)
    assert len(trainings(out)) == 1
    assert "Renamed" in (out / "rivals.md").read_text()
    run(squares, {"perfect": {**PERFECT, "settings": {"size": 2}}}, *options)
    assert len(trainings(out)) == 2


def test_settings_for_a_dataset_of_that_name_replace_the_general_ones(squares: Path) -> None:
    out = run(squares, {"perfect": {**PERFECT, "on": {"squares": {"size": 5}}}}, "--minutes", "1", "--seeds", "0")
    assert json.loads((out / "rivals.json").read_text())["results"][0]["settings"] == {"size": 5}


def test_a_rival_in_steps_is_probed_once_for_all_budgets(squares: Path) -> None:
    table = {"perfect": {**PERFECT, "probe_steps": [1, 3]}}
    (squares.parent / "out" / "results").mkdir(parents=True)
    path = squares.parent / "table.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    (rival,) = rivals_of(squares, table=path)
    rates = squares.parent / "out" / "results" / f"perfect-rate-{rival.key('squares')}.json"
    rates.write_text(json.dumps({"setup": 10.0, "step": 0.5}))
    out = run(squares, table, "--minutes", "1", "2", "--seeds", "0")
    assert trainings(out) == ["1 0 97", "2 0 215"]


def test_steps_are_planned_from_two_short_trainings() -> None:
    found = rate((20, 60), (30.0, 50.0))
    assert (found["setup"], found["step"]) == (20.0, 0.5)
    assert planned(found, 1) == int((0.98 * 60 - 20) / 0.5)
    with pytest.raises(
        SystemExit, match=r"--minutes 0\.2: set-up takes 20 s and a step 0\.5 s of CPU time\. Give more"
    ):
        planned(found, 0.2)


def test_a_failed_training_is_quoted_and_tried_again_next_time_and_the_others_go_on(squares: Path) -> None:
    table = {"failing": {**PERFECT, "label": "Failing", "settings": {"fails": True}}, "perfect": PERFECT}
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"^Failing, 1 minutes, seed 0: (?s:.)*no more memory"):
            run(squares, table, "--minutes", "1", "--seeds", "0")
    out = squares.parent / "out"
    assert len(trainings(out)) == 3
    assert "| Perfect | 1 | 1 | **100.0** (100.0) |" in (out / "rivals.md").read_text()


def test_an_unknown_rival_is_refused_with_the_known_ones(squares: Path) -> None:
    with pytest.raises(SystemExit, match=r"--rivals nobody: not in .*, which has perfect"):
        run(squares, {"perfect": PERFECT}, "--rivals", "nobody")


def test_every_row_of_the_table_has_an_adapter() -> None:
    for rival in rivals_of(Path("any")):
        assert (TABLE.parent / "adapters" / f"{rival.adapter}.py").is_file()
