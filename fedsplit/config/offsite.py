"""The group ``offsite``: adapters tuned against an emulator (``strategy = "offsite-tuning"``)."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.config.bounds import one_of
from fedsplit.errors import ConfigError, check

AVERAGINGS = ("fedavg", "fedadam", "fedmedian", "fedtrimmedavg", "krum")


@dataclass(frozen=True)
class OffsiteConfig:
    """What owners are sent to train on, and how their adapters are averaged.

    Attributes:
        compressor: a row of ``fedsplit.emulators.COMPRESSORS``.
        positions: A's blocks, such as ``0,1,10,11``; empty = the ``adapters`` best by importance.
        adapters: number of A's blocks, where ``positions`` is empty.
        alpha: ScaleOT: share of the other blocks replaced by harmonizers.
        beta: ScaleOT: rank reduction of what remains; GradOT: of all.
        keep: LayerDrop, CRaSh: blocks kept (shared) outside A.
        settle_steps: steps in which the chosen harmonizers are trained together before shipping.
        importance_steps: gradient steps of the importance run, where one is needed.
        public: the server's file of public text, for importance, calibration and plug-in
            evaluation; empty = what the interpreter ships.
        block: tokens of one training block.
        averaging: Flower strategy that averages the owners' adapters.
        proximal: FedProx: weight of the squared distance to the round's start (0 = off).
    """

    compressor: str = "scaleot"
    positions: str = ""
    adapters: int = 4
    alpha: float = 0.5
    beta: float = 0.0
    keep: int = 4
    settle_steps: int = 0
    importance_steps: int = 400
    public: str = ""
    block: int = 128
    averaging: str = "fedavg"
    proximal: float = 0.0

    def __post_init__(self) -> None:
        check(bool(self.compressor), "offsite.compressor", self.compressor, "a compressor's name")
        one_of("offsite.averaging", self.averaging, AVERAGINGS)
        _ = self.chosen
        for name in ("adapters", "keep", "importance_steps"):
            value = getattr(self, name)
            check(value >= 1, f"offsite.{name.replace('_', '-')}", value, ">= 1")
        check(self.settle_steps >= 0, "offsite.settle-steps", self.settle_steps, ">= 0")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"offsite.{name}", value, "in [0, 1]")
        check(2 <= self.block <= 131_072, "offsite.block", self.block, "in [2, 131072] tokens")
        check(0 <= self.proximal <= 1e6, "offsite.proximal", self.proximal, "in [0, 1e6]; 0 = off")

    @property
    def chosen(self) -> tuple[int, ...]:
        """A's blocks as given; empty where importance decides."""
        try:
            found = tuple(int(x) for x in self.positions.split(",") if x.strip())
        except ValueError:
            raise ConfigError(
                f"offsite.positions={self.positions!r}: must be block numbers such as 0,1,10,11"
            ) from None
        good = len(set(found)) == len(found) and all(x >= 0 for x in found)
        check(good, "offsite.positions", self.positions, "distinct block numbers >= 0")
        return found
