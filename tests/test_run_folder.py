"""Tables that people read and files that programs read."""

from __future__ import annotations

from pathlib import Path

from m2f_trainer.evaluation.coco import metrics_table
from m2f_trainer.run_folder import read_metrics, write_metrics

METRICS = {
    "map": 0.41234,
    "map_50": 0.6,
    "map_small": -1.0,
    "box_map": 0.5,
    "map_class/cat": 0.1,
    "map_class/zebra": 1.0,
}


def test_the_table_is_aligned_and_ranks_the_classes() -> None:
    lines = metrics_table(METRICS).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "small", "medium", "large", "AR100"]
    assert lines[1].split() == ["masks", "41.2", "60.0", "-", "-", "-", "-", "-"]
    assert lines[2].split()[:2] == ["boxes", "50.0"]
    assert [line.split() for line in lines[4:]] == [["class", "AP"], ["zebra", "100.0"], ["cat", "10.0"]]
    assert len({len(line) for line in lines[:3]}) == 1


def test_the_table_has_a_row_for_boundaries_where_they_were_scored() -> None:
    lines = metrics_table(METRICS | {"boundary_map": 0.3}).splitlines()
    assert lines[3].split()[:2] == ["boundary", "30.0"]


def test_the_table_reads_the_trainers_prefixed_metrics() -> None:
    assert metrics_table({f"eval_{key}": value for key, value in METRICS.items()}, "eval_") == metrics_table(METRICS)


def test_a_class_name_cannot_steer_the_terminal() -> None:
    table = metrics_table({"map_class/a\x1b[2J": 0.5, "map_class/b\nc": 0.25})
    assert [line.split() for line in table.splitlines()[4:]] == [["class", "AP"], ["a?[2J", "50.0"], ["b?c", "25.0"]]


def test_written_metrics_are_read_back_to_the_last_bit(tmp_path: Path) -> None:
    metrics = {"map": 1 / 3, "map_50": 0.1 + 0.2}
    path = write_metrics(metrics, tmp_path / "new" / "metrics.json")
    assert read_metrics(path) == metrics
    assert [item.name for item in path.parent.iterdir()] == ["metrics.json"]
