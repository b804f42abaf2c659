"""The group ``robust``: what one owner can do to an average, at most."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.errors import check

AVERAGINGS = (
    "fedavg",
    "fedadam",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
    "bulyan",
)


@dataclass(frozen=True)
class RobustConfig:
    """Bounds on owners' contributions, whatever rule averages them.

    Attributes:
        clip: an owner's change of a round is scaled down to this many times the median norm of the
            round's changes; 0 = never.
        weight_cap: an owner weighs at most this many times the round's median number of targets;
            0 = as many as were counted.
        screen: leave out, for the round, a change that points against the others' (four owners or
            more).
        malicious: owners of a round that may lie, for the rules that are told: ``krum`` and
            ``multikrum`` need 2 f + 3 owners that answer, ``bulyan`` 4 f + 3, ``fedtrimmedavg``
            2 f + 1; a round with fewer changes nothing.
    """

    clip: float = 2.0
    weight_cap: float = 2.0
    screen: bool = True
    malicious: int = 1

    def __post_init__(self) -> None:
        for name in ("clip", "weight_cap"):
            value = getattr(self, name)
            known = value == 0 or 1 <= value <= 1e6
            check(known, f"robust.{name.replace('_', '-')}", value, "in [1, 1e6], or 0 = off")
        check(0 <= self.malicious <= 10_000, "robust.malicious", self.malicious, "in [0, 10000]")
