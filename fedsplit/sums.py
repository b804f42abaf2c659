"""Numbers of a report that add up over texts and owners: ``FAMILY-i`` or ``FAMILY-i-j``.

A task says which families its owners may report (:attr:`fedsplit.tasks.Task.families`).  What a
metric needs is then the sum of all owners' numbers, so it is the metric of their texts together,
and nobody needs anybody's rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LARGEST = 1e15  # a float holds every whole number up to it
_INDEX = r"(\d|[1-9]\d{1,3})"
_KEY = re.compile(rf"([a-z]{{2,20}})-{_INDEX}(?:-{_INDEX})?")


@dataclass(frozen=True)
class Family:
    """One family of additive numbers.

    Unless it is unbounded, no number of a family exceeds the report's number of targets in size.

    Attributes:
        name: lower-case letters.
        sizes: for each of the one or two indices, the bound below which it is.
        whole: whether its numbers count something: integers, 0 or more.
        all_targets: whether a report's numbers of the family are its targets together.
        bounded: whether the number of targets bounds them: not where they count what has no target.
    """

    name: str
    sizes: tuple[int, ...]
    whole: bool = True
    all_targets: bool = False
    bounded: bool = True

    def has(self, key: str) -> bool:
        """Whether ``key`` is one of the family's."""
        found = split_key(key)
        if found is None or found[0] != self.name or len(found[1]) != len(self.sizes):
            return False
        return all(index < size for index, size in zip(found[1], self.sizes, strict=True))

    def of(self, sums: Mapping[str, float]) -> dict[tuple[int, ...], float]:
        """Return the family's numbers among others, by their indices."""
        return {
            found[1]: value
            for key, value in sums.items()
            if self.has(key) and (found := split_key(key)) is not None
        }

    def fault(self, metrics: Mapping[str, float], targets: float) -> str | None:
        """Return what is wrong with a report's numbers of this family, or None."""
        own = {key: value for key, value in metrics.items() if self.has(key)}
        most = targets if self.bounded else LARGEST
        for key, value in own.items():
            low = 0.0 if self.whole else -most
            if not low <= value <= most:
                what = ", the targets" if self.bounded else ""
                return f"{key}={value}: must be in [{low:g}, {most:g}]{what}"
            if self.whole and value % 1:
                return f"{key}={value}: must be a whole number"
        if own and self.all_targets and sum(own.values()) != targets:
            return f"{self.name}: must be {targets:g} in all"
        return None


def split_key(key: str) -> tuple[str, tuple[int, ...]] | None:
    """Return (family, indices) of an additive number's key; None for any other key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return match[1], tuple(int(index) for index in match.groups()[1:] if index is not None)


def is_sum(key: str) -> bool:
    """Whether a number of a report is additive."""
    return split_key(key) is not None


def add_up(reports: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of several reports' additive numbers; others are left out."""
    found: dict[str, float] = {}
    for report in reports:
        for key, value in report.items():
            if is_sum(key):
                found[key] = found.get(key, 0.0) + value
    return found
