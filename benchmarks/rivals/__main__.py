"""Compare toolkits on the same data with the same CPU time: python -m benchmarks.rivals DATASET OUT [options]

Each rival is trained in its own environment once for each budget and seed, and all are scored by the same script.
Results are kept in OUT/results and reused. Writes OUT/rivals.md, OUT/rivals.json and OUT/rivals.png. See README.md
beside this file.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.rivals.report import write_report
from benchmarks.rivals.running import Benchmark
from benchmarks.rivals.table import TABLE, rivals_of


def main(words: list[str] | None = None) -> None:
    """Train the rivals without a result, then write the report.

    A rival that fails doesn't stop the others.

    Raises:
        SystemExit: one failed; the message has the end of its log
    """
    given = _parser().parse_args(words)
    rivals = rivals_of(given.dataset, given.rivals, given.table)
    out = given.out.absolute()
    benchmark = Benchmark(
        given.dataset.resolve(), given.backbone.absolute(), out, (given.environments or out / "environments").absolute()
    )
    results, failures = [], []
    for seed in given.seeds:
        for minutes in given.minutes:
            for rival in rivals:
                try:
                    results.append(benchmark.result(rival, minutes, seed))
                except RuntimeError as error:
                    failures.append(f"{rival.label}, {minutes:g} minutes, seed {seed}: {error}")
    order = {rival.name: k for k, rival in enumerate(rivals)}
    results.sort(key=lambda one: order[one["rival"]])
    command = " ".join(["python -m benchmarks.rivals", *(sys.argv[1:] if words is None else words)])
    if results:
        print(write_report(results, out, command))
    if failures:
        raise SystemExit("\n\n".join(failures))


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("dataset", type=Path, help="folder with train/ and valid/, each with _annotations.coco.json")
    made.add_argument("out", type=Path, help="folder for results, models and environments")
    made.add_argument(
        "--backbone", type=Path, required=True, help="folder of a pretrained DINOv2-S in transformers' format"
    )
    made.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20], help="budgets in CPU-minutes [5 10 20]")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--rivals", nargs="+", help="rows of the table to run [all]")
    made.add_argument("--table", type=Path, default=TABLE, help="the table of rivals [rivals.json beside this module]")
    made.add_argument("--environments", type=Path, help="folder of the rivals' environments [OUT/environments]")
    return made


if __name__ == "__main__":
    main()
