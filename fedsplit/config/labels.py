"""The groups ``labels`` and ``dp``: what protects labels, and what an owner trains itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsplit.errors import check, one_of

TAIL_WEIGHTS = ("averaged", "own")


@dataclass(frozen=True)
class LabelsConfig:
    """What stands between the server and the owners' labels.

    Attributes:
        protection: ``auto`` (``none``, where that does not undo what noise on representations
            hides), ``none`` (the head is at the server, whose gradient shows every label),
            ``client-head`` (U-shape), ``client-tail`` (the last blocks too; no gradient leaves),
            ``randomised-response``, ``marvell``, ``max-norm``, ``row-noise``, or ``client-head+``
            one of the last four: rows of
            :data:`fedsplit.privacy.labels.table.LABEL_PROTECTIONS`, checked when settings are read
            (:mod:`fedsplit.settings`).
        epsilon: label-DP parameter of randomised response (nats).
        debias: correct the loss for randomised response's known transition matrix.
        noise_power: Marvell's budget s: expected squared noise norm per gradient, as a multiple of
            the squared distance between the two classes' mean gradients.
        noise_ratio: mean length of the noise on a gradient row over ``gradient_clip``
            (``row-noise``).
        gradient_clip: bound on the norm of one target's own gradient (``row-noise``).
        tail_blocks: last blocks that the owner holds under ``client-tail``.
        tail_weights: ``averaged``: tails are averaged after each round, so their weights leave;
            ``own``: every owner keeps its own and no weight leaves.
    """

    protection: str = "auto"
    epsilon: float = 1.0
    debias: bool = False
    noise_power: float = 4.0
    noise_ratio: float = 10.0
    gradient_clip: float = 1.0
    tail_blocks: int = 2
    tail_weights: str = "averaged"

    def __post_init__(self) -> None:
        check(0 < self.epsilon <= 100, "labels.epsilon", self.epsilon, "in (0, 100] nats")
        good = self.noise_power > 0 and math.isfinite(self.noise_power)
        check(good, "labels.noise-power", self.noise_power, "> 0 and finite")
        for name in ("noise_ratio", "gradient_clip"):
            value = getattr(self, name)
            good = value > 0 and math.isfinite(value)
            check(good, f"labels.{name.replace('_', '-')}", value, "> 0 and finite")
        check(self.tail_blocks >= 1, "labels.tail-blocks", self.tail_blocks, ">= 1")
        one_of("labels.tail-weights", self.tail_weights, TAIL_WEIGHTS)


@dataclass(frozen=True)
class DpConfig:
    """DP-SGD for what an owner trains itself: its head, its joint bottom.

    Attributes:
        noise_multiplier: standard deviation of the noise in units of ``clip``; 0 = off.
        clip: bound on one sample's gradient norm; replaces ``train.clip`` there.
        delta: of the (epsilon, delta) that is reported; below 1 / samples of an owner.
        accountant: ``rdp`` or ``prv`` (Opacus's).
    """

    noise_multiplier: float = 0.0
    clip: float = 1.0
    delta: float = 1e-5
    accountant: str = "rdp"

    def __post_init__(self) -> None:
        noise = self.noise_multiplier
        check(0 <= noise <= 1e6, "dp.noise-multiplier", noise, "in [0, 1e6]; 0 = off")
        check(0 < self.clip <= 1e6, "dp.clip", self.clip, "in (0, 1e6]")
        check(0 < self.delta < 1, "dp.delta", self.delta, "in (0, 1)")
        one_of("dp.accountant", self.accountant, ("rdp", "prv"))
