"""The rivals, as rows of rivals.json."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("rivals.json")


@dataclass(frozen=True)
class Rival:
    """One row, for one dataset.

    `adapter` is a module, in `benchmarks.rivals.adapters` where its name has no dot. `packages` are what its own
    environment gets; without any, it runs in ours. `probe_steps` says that its schedule is given in steps: two short
    trainings of so many steps tell how many fit into a budget.
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
        """Changes when what is run does; the label is free."""
        said = json.dumps([self.adapter, self.packages, self.settings, *more], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:8]


def rivals_of(dataset: Path, names: list[str] | None = None, table: Path = TABLE) -> list[Rival]:
    """The named rows, or all, in the table's order; `on` has settings for datasets whose folder has that name.

    Raises:
        SystemExit: a name isn't in the table
    """
    rows: dict[str, dict[str, Any]] = json.loads(table.read_text(encoding="utf-8"))
    unknown = [name for name in names or () if name not in rows]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: not in {table}, which has {', '.join(rows)}.")
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
