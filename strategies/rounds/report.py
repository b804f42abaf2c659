"""What one round came to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NEVER = "never connected"
HUNG_UP = "SessionError: session closed: peer closed"


def natural(name: str) -> tuple[Any, ...]:
    """Return a key that sorts owner-2 before owner-10."""
    # isdecimal is what \d matches and int reads; isdigit has superscripts too
    return tuple(int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name))


@dataclass
class CohortReport:
    """What the steps of a round came to."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    compute_s: float = 0.0
    waiting_s: float = 0.0
    seconds: float = 0.0
    lost: dict[str, str] = field(default_factory=dict)
    charged: dict[str, str] = field(default_factory=dict)


@dataclass
class RoundReport:
    """What the sessions of a round came to.

    Attributes:
        targets: owner -> targets of the steps that it trained in.
        most: owner -> (samples of its session, rows of output that it was sent): as many examples,
            and targets of an evaluation, as it can report.
    """

    mode: str
    cohort: CohortReport = field(default_factory=CohortReport)
    waves: list[list[str]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    frames: int = 0
    row_bytes: int = 0
    row_tokens: int = 0
    targets: dict[str, float] = field(default_factory=dict)
    most: dict[str, tuple[int, int]] = field(default_factory=dict)
    error: str = ""

    def lose(self, node: int, name: str | None, reason: str) -> None:
        """Record why an owner's reply does not count; what its session told takes precedence."""
        lost = self.cohort.lost
        if lost.get(f"node {node}", "").startswith(NEVER):
            del lost[f"node {node}"]
        key = name or f"node {node}"
        if lost.get(key, "").startswith(HUNG_UP):
            del lost[key]  # whether its last words or the end of its stream came first is chance
        lost.setdefault(key, reason)

    def lose_silent(self, node: int, name: str | None, reason: str) -> None:
        """Record an owner that never replied, unless its session has told why."""
        if not self.cohort.lost.keys() & {f"node {node}", name}:
            self.cohort.lost[name or f"node {node}"] = reason

    def use_names(self, names: Mapping[int, str]) -> None:
        """Record lost nodes under their owners' names where those are known."""
        known = {f"node {node}": name for node, name in names.items()}
        self.cohort.lost = {known.get(k, k): why for k, why in self.cohort.lost.items()}

    def reasons(self) -> str:
        """Return who was lost and why, as one text of bounded length."""
        return "; ".join(f"{name}: {why}" for name, why in self.cohort.lost.items())[:2000]

    def to_dict(self) -> dict[str, Any]:
        """Return the report, JSON-able."""
        row = {k: v for k, v in vars(self).items() if k not in ("cohort", "most")}
        return {**row, **vars(self.cohort)}
