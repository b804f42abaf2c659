"""The gap between a model and its emulator, and what share of it an attack closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsplit.errors import AttackError
from fedsplit.evaluation.perplexity import TextLoss
from fedsplit.seeding import numpy_generator
from fedsplit.statistics import mean_half_width


@dataclass(frozen=True)
class Closed:
    """What share of a gap was closed.

    Attributes:
        full: mean loss of the full model (nats a token); likewise the next two.
        emulator: of the emulator as it was sent.
        attacked: of the emulator after the attack.
        share: (emulator - attacked) / (emulator - full); None where the emulator is not clearly
            worse than the full model (the gap's own 95 % interval reaches 0): there is nothing to
            close.
        interval: 95 % interval of the share over blocks.
    """

    full: float
    emulator: float
    attacked: float
    share: float | None
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        low_high = None if self.interval is None else list(self.interval)
        return {**vars(self), "interval": low_high}


def closed_share(
    full: TextLoss, emulator: TextLoss, attacked: TextLoss, *, draws: int = 2000, seed: int = 0
) -> Closed:
    """Compare three losses of the same blocks of text.

    The interval is a percentile bootstrap over blocks, all three losses of a block together.

    Raises:
        AttackError: if the blocks are not the same, or less than two.
    """
    tokens = full.block_tokens
    for other in (emulator, attacked):
        if not np.array_equal(other.block_tokens, tokens):
            raise AttackError("losses: must be of the same blocks of one text")
    if len(tokens) < 2:
        raise AttackError(f"blocks={len(tokens)}: must be >= 2, for an interval")
    gap = emulator.block_nats - full.block_nats
    gain = emulator.block_nats - attacked.block_nats
    spread = mean_half_width(gap)
    share: float | None = None
    interval: tuple[float, float] | None = None
    if float(gap.mean()) > spread:
        rng = numpy_generator(seed, "attacks", "extraction")
        weight = rng.multinomial(len(gap), np.full(len(gap), 1.0 / len(gap)), size=draws)
        shares = (weight @ gain) / (weight @ gap)
        share = float(gain.sum() / gap.sum())
        interval = (float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975)))
    return Closed(full.nats, emulator.nats, attacked.nats, share, interval)
