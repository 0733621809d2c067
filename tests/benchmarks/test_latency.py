"""The table of latencies."""

from benchmarks.latency import table


def test_each_runtime_is_compared_with_the_first_of_its_network() -> None:
    seconds = {
        ("ours", "torch"): {"cpu": 2.0, "wall": 3.0},
        ("ours", "int8"): {"cpu": 0.5, "wall": 0.6},
        ("rival", "onnx"): {"cpu": 1.0, "wall": 1.0},
    }
    rows = table(seconds, side=512)
    assert [(row["network"], row["runtime"], row["ratio"]) for row in rows] == [
        ("ours", "torch", 1.0), ("ours", "int8", 4.0), ("rival", "onnx", 1.0)
    ]  # fmt: skip
    assert rows[1]["cpu ms"] == 500
