"""The report: a table, a JSON file, and a chart of AP over CPU-minutes."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = Sequence[dict[str, Any]]
OVER = 1.02
"""A row whose runs took on average more than this times the budget is marked."""


def write_report(results: Results, out: Path, command: str) -> str:
    """Write `rivals.json`, `rivals.md` and `rivals.png`; return the markdown."""
    out.mkdir(parents=True, exist_ok=True)
    text = to_markdown(results, command)
    (out / "rivals.json").write_text(json.dumps({"command": command, "results": list(results)}, indent=1) + "\n")
    (out / "rivals.md").write_text(text, encoding="utf-8")
    draw(results, out / "rivals.png")
    return text


def groups(results: Results) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Label -> budget in minutes -> results, one for each seed."""
    made: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for one in sorted(results, key=lambda one: (one["minutes"], one["seed"])):
        made.setdefault(one["label"], {}).setdefault(one["minutes"], []).append(one)
    return made


def to_markdown(results: Results, command: str) -> str:
    """A line for each rival and budget, AP in percent; then machine, command, settings and versions."""
    lines = ["| | CPU-minutes | seeds | AP (each) | AP50 | AP75 | small | medium | large | images seen | took |"]
    lines.append("|---|" + "---:|" * 10)
    for label, budgets in groups(results).items():
        for minutes, runs in budgets.items():
            each = [100 * one["figures"]["AP"] for one in runs]
            shown = f"**{statistics.mean(each):.1f}** ({', '.join(f'{value:.1f}' for value in each)})"
            others = [_points(runs, name) for name in ("AP50", "AP75", "small", "medium", "large")]
            took = statistics.mean(one["cpu_minutes"] for one in runs)
            mark = " (over)" if took > OVER * minutes else ""
            images = statistics.mean(one["trained"]["images"] for one in runs)
            cells = [label, f"{minutes:g}", f"{len(runs)}", shown, *others, f"{images:,.0f}", f"{took:.1f}{mark}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_details(results, command)]) + "\n"


def _points(runs: Results, name: str) -> str:
    values = [one["figures"][name] for one in runs]
    return "-" if min(values) < 0 else f"{100 * statistics.mean(values):.1f}"


def _details(results: Results, command: str) -> list[str]:
    machines = sorted({f"{one['machine']['processor']}, {one['machine']['threads']} thread" for one in results})
    dates = sorted({one["date"] for one in results})
    dataset = ", ".join(sorted({one["dataset"] for one in results}))
    details = [
        f"{dataset}, {'; '.join(machines)}; {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}. `{command}`.",
        "",
    ]
    for label, budgets in groups(results).items():
        runs = [one for several in budgets.values() for one in several]
        found: dict[str, dict[str, None]] = {}  # each version once, in order
        for one in runs:
            for name, version in one["versions"].items():
                found.setdefault(name, {})[version] = None
        versions = ", ".join(f"{name} {' and '.join(several)}" for name, several in found.items())
        details.append(f"- {label}: `{json.dumps(runs[0]['settings'])}`; {versions}.")
    return details


def draw(results: Results, path: Path) -> None:
    """Draw AP over the CPU-minutes used: the mean of the seeds as a line, their range as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends = []
    for k, (label, budgets) in enumerate(groups(results).items()):
        points = [(statistics.mean(one["cpu_minutes"] for one in runs), _each(runs)) for runs in budgets.values()]
        minutes = [point[0] for point in points]
        means = [statistics.mean(each) for _, each in points]
        (line,) = axes.plot(minutes, means, marker="o", linewidth=2.5 if k == 0 else 1.5, markersize=5, zorder=10 - k)
        lows, highs = [min(each) for _, each in points], [max(each) for _, each in points]
        axes.fill_between(minutes, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.vlines(minutes, lows, highs, color=line.get_color(), linewidth=1)
        ends.append((minutes[-1], means[-1], label, line.get_color()))
    _label_lines(axes, ends)
    axes.set_xlabel("CPU-minutes of training, one thread")
    axes.set_ylabel("mask AP, whole validation images")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(", ".join(sorted({one["dataset"] for one in results})), loc="left", fontsize=10)
    figure.savefig(path)


def _each(runs: Results) -> list[float]:
    return [100 * one["figures"]["AP"] for one in runs]


def _label_lines(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each label right of the end of its line (minutes, AP, label, colour), moved up where two would overlap."""
    top = max(max(ap for _, ap, _, _ in ends), 1.0) * 1.08
    right = max(minutes for minutes, *_ in ends)
    axes.set_ylim(0, top)
    height, last = 0.06 * top, -1.0
    for minutes, ap, label, colour in sorted(ends, key=lambda end: end[1]):
        last = max(ap, last + height)
        axes.annotate(
            f"{label} {ap:.1f}", (minutes, ap), (minutes + 0.03 * right, last), color=colour, fontsize=9, va="center",
            annotation_clip=False,
        )  # fmt: skip
