"""Match the classes of a dataset's splits by name; the same class may have another id in each split."""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import TypeVar

from m2f_trainer.data.problems import Report, listed, raise_problem
from m2f_trainer.data.splits import SplitAnnotations

Annotations = TypeVar("Annotations", bound=SplitAnnotations)


def normalized_name(name: str) -> str:
    """A class name without differences in case and spaces."""
    return " ".join(name.split()).casefold()


def match_categories(
    splits: Mapping[str, Annotations], report: Report = raise_problem
) -> tuple[dict[str, Annotations], dict[int, str]]:
    """The splits with one id for each class name, that of the first split, and the names of the used classes by id.

    Spaces around a name are ignored. Names that differ only in case are matched too, with a report, unless the split
    has another category of that name. A class that the first split lacks keeps its id if that is free.
    Categories without annotations never cause an error.

    Reports a name with two used ids in one split, and a possibly renamed class: an id with one name in the first split
    and another name here, where neither split has the other's name.
    """
    matcher = _Matcher(splits, report)
    matched = {key: matcher.renumbered(split) for key, split in splits.items()}
    used = {key for split in matched.values() for key in split.used_categories()}
    return matched, {key: matcher.names[key] for key in sorted(used)}


class _Matcher:
    """The classes found so far: their names by id, and the split that each comes from."""

    def __init__(self, splits: Mapping[str, SplitAnnotations], report: Report) -> None:
        self.names: dict[int, str] = {}
        self._by_name: dict[str, list[int]] = {}
        self._by_normalized_name: dict[str, list[int]] = {}
        self._first: dict[int, SplitAnnotations] = {}
        self._used: set[int] = set()
        self._report = report
        declared = [key for split in splits.values() for key in split.categories]
        self._free = max(declared, default=0) + 1

    def renumbered(self, split: Annotations) -> Annotations:
        """The split with the ids of the classes found so far; its own classes are added to them."""
        used = split.used_categories()
        self._report_repeated_names(split, used)
        ids: dict[int, int] = {}
        taken: set[int] = set()
        exact = {name.strip() for key, name in split.categories.items() if key in used}
        present = set(map(normalized_name, split.categories.values()))
        for key in sorted(split.categories, key=lambda key: (key not in used, key)):
            name = split.categories[key]
            found = self._find(name, taken, exact if key in used else set())
            if found is None:
                renamed = key in used and self._is_renamed(split, key, present)
                found = key if renamed else self._add(split, key)
            ids[key] = found
            taken.add(found)
            known = self.names[found]
            if key in used and known.strip() != name.strip() and normalized_name(known) == normalized_name(name):
                message = f"category {key}: {name!r} is taken as {known!r} of {self._first[found].name}."
                self._report("category-case", split.name, [key], message)
        self._used |= {ids[key] for key in used}
        changed = {key: new for key, new in ids.items() if key != new and key in used}
        for key, new in changed.items():
            message = (
                f"category {key} ({split.categories[key]}) has the id {new} of {self._first[new].name}:"
                " classes are matched by name."
            )
            self._report("renumbered-category", split.name, [key], message)
        categories = {new: self.names[new] for new in ids.values()}
        if not changed:
            return replace(split, categories=categories)
        annotations = {
            image: [{**entry, "category_id": ids[entry["category_id"]]} for entry in group]
            for image, group in split.annotations.items()
        }
        return replace(split, annotations=annotations, categories=categories)

    def _find(self, name: str, taken: set[int], others: set[str]) -> int | None:
        """The class of this name, exact first, then without regard to case, among those not `taken` by the split.

        `others` are the names of the split's own classes, which only an exact match may use.
        """
        exact = [key for key in self._by_name.get(name.strip(), ()) if key not in taken]
        if exact:
            return min(exact, key=lambda key: (key not in self._used, key))
        alike = [
            key
            for key in self._by_normalized_name.get(normalized_name(name), ())
            if key not in taken and self.names[key].strip() not in others
        ]
        return alike[0] if len(alike) == 1 else None

    def _add(self, split: SplitAnnotations, key: int) -> int:
        new = key if key not in self.names else self._free
        self._free += new == self._free
        name = split.categories[key]
        self.names[new], self._first[new] = name, split
        self._by_name.setdefault(name.strip(), []).append(new)
        self._by_normalized_name.setdefault(normalized_name(name), []).append(new)
        return new

    def _report_repeated_names(self, split: SplitAnnotations, used: set[int]) -> None:
        by_name: dict[str, list[int]] = {}
        for key in sorted(used):
            by_name.setdefault(split.categories[key].strip(), []).append(key)
        for name, ids in by_name.items():
            if len(ids) > 1:
                message = (
                    f"{split.name}: categories {listed(ids)} are all named {name!r}. Give each its own name, or use"
                    " one id."
                )
                self._report("repeated-category-name", split.name, ids, message)

    def _is_renamed(self, split: SplitAnnotations, key: int, present: Set[str]) -> bool:
        """Whether the id may be a known class with a new name; if so, it is reported.

        `present` are the normalized names of the split's categories.
        """
        first = self.names.get(key)
        if first is None or key not in self._used:
            return False
        if normalized_name(first) in present:
            return False
        name, where = split.categories[key], self._first[key].name
        message = (
            f"category {key} is {first!r} in {where} but {name!r} in {split.name}."
            " Give it one name if it is one class, or use two ids if there are two."
        )
        self._report("renamed-category", split.name, [key], message)
        return True
