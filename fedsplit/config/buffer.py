"""The group ``buffer``: rounds that do not wait for every owner."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.errors import check


@dataclass(frozen=True)
class BufferConfig:
    """Buffered asynchronous aggregation (FedBuff, arXiv 2106.06639), in offsite tuning.

    Attributes:
        size: updates that make a round; the owners still at work go on, and count in a later one;
            0 = a round waits for all that it asked.
        staleness: a change that began s rounds ago counts ``(1 + s)^-staleness`` times.
        most_stale: a change that began more rounds ago is not used.
        spread: in simulations, how much owners differ in speed (standard deviation of the logarithm
            of the time that they take); who comes first follows from the run's seed.
    """

    size: int = 0
    staleness: float = 0.5
    most_stale: int = 20
    spread: float = 0.5

    def __post_init__(self) -> None:
        check(0 <= self.size <= 100_000, "buffer.size", self.size, "in [0, 100000]; 0 = all")
        check(0 <= self.staleness <= 10, "buffer.staleness", self.staleness, "in [0, 10]")
        most = self.most_stale
        check(0 <= most <= 10_000, "buffer.most-stale", most, "in [0, 10000] rounds")
        check(0 <= self.spread <= 5, "buffer.spread", self.spread, "in [0, 5]")
