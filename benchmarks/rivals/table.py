"""The table of rivals, rivals.json."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("rivals.json")


@dataclass(frozen=True)
class Rival:
    """One row, with its settings for one dataset.

    `adapter` is a module; a name without a dot is one of `benchmarks.rivals.adapters`. `packages` are installed in the
    rival's own environment; a row without packages runs in ours. `probe_steps` is for a rival whose schedule needs a
    number of steps: two short trainings of these lengths measure how many steps fit into a budget.
    """

    name: str
    label: str
    adapter: str
    packages: tuple[str, ...]
    settings: dict[str, Any]
    probe_steps: tuple[int, int] | None

    @property
    def module(self) -> str:
        """The adapter's full name."""
        return self.adapter if "." in self.adapter else f"benchmarks.rivals.adapters.{self.adapter}"

    def key(self, *more: str) -> str:
        """A hash of everything that affects results, so not of the label."""
        content = json.dumps([self.adapter, self.packages, self.settings, *more], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


def rivals_of(dataset: Path, names: list[str] | None = None, table: Path = TABLE) -> list[Rival]:
    """The named rows, or all, in the table's order. A row's `on` replaces settings for a dataset folder of that name.

    Raises:
        SystemExit: a name isn't in the table
    """
    rows: dict[str, dict[str, Any]] = json.loads(table.read_text(encoding="utf-8"))
    unknown = [name for name in names or () if name not in rows]
    if unknown:
        raise SystemExit(f"--rivals {', '.join(unknown)}: not in {table}, which has {', '.join(rows)}.")
    return [_rival(name, row, dataset.resolve().name) for name, row in rows.items() if name in (names or rows)]


def _rival(name: str, row: dict[str, Any], dataset: str) -> Rival:
    probes = row.get("probe_steps")
    return Rival(
        name=name,
        label=row["label"],
        adapter=row["adapter"],
        packages=tuple(row["packages"]),
        settings={**row["settings"], **row.get("on", {}).get(dataset, {})},
        probe_steps=(probes[0], probes[1]) if probes else None,
    )
