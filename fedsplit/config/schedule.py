"""How the learning rate follows the run's progress: the same for the server and its owners."""

from __future__ import annotations

import math

from fedsplit.config.groups import TrainConfig


def rate_factor(config: TrainConfig, progress: float) -> float:
    """Return the share of the peak rate at ``progress`` in [0, 1] of the run."""
    warmup = config.warmup
    if warmup and progress < warmup:
        return max(progress / warmup, 1e-3)
    if config.schedule == "constant":
        return 1.0
    left = max(0.0, (1.0 - progress) / (1.0 - warmup))
    if config.schedule == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * min(left, 1.0)))
    return left
