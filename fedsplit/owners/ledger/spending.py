"""What an owner's trained weights have cost: sessions, and DP-SGD's noisy steps, composed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsplit.privacy.dp.accounting import NoisySteps, composed_epsilon

DELTA = 1e-5  # of composed epsilons where no policy names another


@dataclass
class ReportTotals:
    """What reports of averages add up to.

    Attributes:
        days: UTC day -> reports.
        epsilon: of all that were noisy, basic composition (nats per text).
        exact: reports without noise.
    """

    days: dict[str, int] = field(default_factory=dict)
    epsilon: float = 0.0
    exact: int = 0

    def apply(self, entry: Mapping[str, Any]) -> None:
        """Add one report."""
        day = str(entry["time"])[:10]
        self.days[day] = self.days.get(day, 0) + 1
        if "epsilon" in entry:
            self.epsilon += float(entry["epsilon"])
        else:
            self.exact += 1


@dataclass
class TrainingTotals:
    """What records of training add up to.

    Attributes:
        sessions: number of records.
        exact: of them, without noise.
        days: UTC day -> records.
        noise: key of noisy steps -> number of steps.
    """

    sessions: int = 0
    exact: int = 0
    days: dict[str, int] = field(default_factory=dict)
    noise: dict[str, int] = field(default_factory=dict)

    def apply(self, told: Mapping[str, Any], time: str) -> None:
        """Add one record, as a line's ``training`` has it."""
        self.sessions += 1
        self.days[time[:10]] = self.days.get(time[:10], 0) + 1
        if "noise" not in told:
            self.exact += 1
            return
        steps = NoisySteps.from_json(told["noise"])
        self.noise[steps.key] = self.noise.get(steps.key, 0) + steps.steps

    def epsilon(self, delta: float, more: NoisySteps | None = None) -> float:
        """Return what all noisy steps have cost, with those that are about to be taken.

        Raises:
            ConfigError: Opacus is not installed.
        """
        history = [NoisySteps.from_key(key, steps) for key, steps in self.noise.items()]
        return composed_epsilon([*history, *([more] if more else [])], delta)
