"""The group ``secure``: what owners average is added up under masks."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.errors import check


@dataclass(frozen=True)
class SecureConfig:
    """Secure aggregation (Bonawitz et al. 2017, SecAgg+): the server sees sums of updates alone.

    Attributes:
        aggregation: add up adapters, joint bottoms and heads under masks.
        threshold: share of an owner's neighbours that must answer to open one of its secrets; at
            least as many may be lost in a round as this leaves, and this share may not be the
            server's own.
        neighbours: owners that each shares masks with, an even number; 0 = all of the round.
        bound: on the change of a single weight in a round; larger ones are cut to it.
        norm: bound on the L2 norm of an owner's whole change, kept by the owner; 0 = off.
        most_targets: largest weight of an owner in the average; more targets count as that many.
        bits: of one number on the wire, 32 or 64.
        min_owners: fewest owners of a sum; a round with fewer changes nothing.
    """

    aggregation: bool = False
    threshold: float = 0.66
    neighbours: int = 0
    bound: float = 0.1
    norm: float = 0.0
    most_targets: int = 65_536
    bits: int = 32
    min_owners: int = 3

    def __post_init__(self) -> None:
        check(0.5 <= self.threshold < 1, "secure.threshold", self.threshold, "in [0.5, 1)")
        even = self.neighbours % 2 == 0 and 0 <= self.neighbours <= 10_000
        check(even, "secure.neighbours", self.neighbours, "even, in [0, 10000]; 0 = all")
        check(1e-12 <= self.bound <= 1e6, "secure.bound", self.bound, "in [1e-12, 1e6]")
        check(0 <= self.norm <= 1e6, "secure.norm", self.norm, "in [0, 1e6]; 0 = off")
        most = self.most_targets
        check(1 <= most <= 2**40, "secure.most-targets", most, "in [1, 2^40]")
        check(self.bits in (32, 64), "secure.bits", self.bits, "32 or 64")
        check(2 <= self.min_owners <= 100_000, "secure.min-owners", self.min_owners, ">= 2")
