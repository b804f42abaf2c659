"""Intervals and areas that several families report, each in one place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.errors import check

Z95 = 1.959963984540054
Floats = npt.NDArray[np.float64]


def wilson_bounds(share: Floats, n: Floats, z: float = Z95) -> tuple[Floats, Floats]:
    """Return both ends of Wilson's score interval (1927) of shares seen in ``n`` trials each."""
    centre = share + z * z / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - half) / scale, (centre + half) / scale


def wilson_interval(share: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of one share; it holds the share, and is (0, 1) for n = 0."""
    if n <= 0:
        return 0.0, 1.0
    low, high = wilson_bounds(np.float64(share), np.float64(n), z)  # type: ignore[arg-type]
    return max(0.0, min(float(low), share)), min(1.0, max(float(high), share))


def mean_half_width(values: Any) -> float:
    """Return half the width of Student's 95 % interval of a mean.

    Args:
        values: at least two.

    Raises:
        ConfigError: for fewer.
    """
    found = np.asarray(values, float).ravel()
    check(len(found) >= 2, "values", len(found), ">= 2, for an interval")
    from scipy.special import stdtrit

    spread: float = float(stdtrit(len(found) - 1, 0.975)) * float(found.std(ddof=1))
    return spread / math.sqrt(len(found))


def auc(positives: Any, negatives: Any) -> float:
    """Return the area under the ROC curve: the share of pairs in the right order, ties half.

    Args:
        positives: scores that should be the higher ones, at least one.
        negatives: the others, at least one.

    Raises:
        ConfigError: if either side is empty.
    """
    high, low = (np.asarray(x, dtype=np.float64) for x in (positives, negatives))
    for name, side in (("positives", high), ("negatives", low)):
        check(side.size >= 1, name, side.size, ">= 1 (scores)")
    # Mann and Whitney's U from ranks, a mean rank for each tie.
    _, tied, count = np.unique(np.concatenate([high, low]), return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[tied]
    n = len(high)
    return float((rank[:n].sum() - n * (n + 1) / 2) / (n * len(low)))
