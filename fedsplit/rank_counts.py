"""Spearman's coefficient of pairs that are known by counts alone, and how far off it can be.

Values are sorted into levels.  A value's true rank differs from the mean rank of its level by a
part e that sums to zero over the level, so with x = X + e and y = Y + f (true ranks, ranks of
levels, all centred)

    <x, y> = <X, Y> + <X, f> + <e, Y> + <e, f>,    |x|^2 = |X|^2 + |e|^2,

where <X, f> sees only what of X differs within levels of y, |e|^2 <= sum n (n^2 - 1) / 12 over the
levels of x, and likewise for y.  That bounds the coefficient on both sides (Cauchy and Schwarz).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def rank_correlation(counts: Mapping[tuple[int, int], float]) -> tuple[float, float]:
    """Return (Spearman's coefficient of the levels, bound on its distance from the values' own).

    Args:
        counts: (level of x, level of y) -> how many pairs are there.

    Returns:
        (0, 1) where one side has a single level: then nothing is known.
    """
    if not counts:
        return 0.0, 1.0
    size = [1 + max(pair[side] for pair in counts) for side in (0, 1)]
    table = np.zeros((size[0], size[1]))
    for pair, count in counts.items():
        table[pair] += count
    rows, columns = table.sum(1), table.sum(0)
    x, y = _mean_ranks(rows), _mean_ranks(columns)
    xx, yy, xy = float(rows @ x**2), float(columns @ y**2), float(x @ table @ y)
    if min(xx, yy) <= 0:
        return 0.0, 1.0
    found = xy / math.sqrt(xx * yy)
    ee, ff = _most_inside(rows), _most_inside(columns)
    # What of X is left within a level of y, and the other way round.
    x_left = xx - float(_shares(x @ table, columns))
    y_left = yy - float(_shares(table @ y, rows))
    slack = math.sqrt(max(x_left, 0.0) * ff) + math.sqrt(max(y_left, 0.0) * ee) + math.sqrt(ee * ff)
    least, most = math.sqrt(xx * yy), math.sqrt((xx + ee) * (yy + ff))
    high = (xy + slack) / (least if xy + slack > 0 else most)
    low = (xy - slack) / (least if xy - slack < 0 else most)
    return found, max(min(high, 1.0) - found, found - max(low, -1.0))


def spearman(x: Floats, y: Floats) -> float:
    """Return Spearman's coefficient of pairs, ties with their mean rank; 0 where it is undefined.

    Args:
        x, y: (n,) values.
    """
    ranks = []
    for values in (x, y):
        _, level, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append(_mean_ranks(counts.astype(np.float64))[level])
    size = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    return max(-1.0, min(1.0, float(ranks[0] @ ranks[1]) / size)) if size else 0.0


def _mean_ranks(counts: Floats) -> Floats:
    """Return each level's mean rank, centred: counts @ ranks == 0."""
    below = np.cumsum(counts) - counts
    ranks: Floats = below + (counts - counts.sum()) / 2
    return ranks


def _most_inside(counts: Floats) -> float:
    """Return the largest sum of squares of ranks around their levels' means."""
    return float((counts * (counts**2 - 1)).sum() / 12)


def _shares(sums: Floats, counts: Floats) -> float:
    """Return the sum of squares of means over groups, each as often as the group has members."""
    there = counts > 0
    return float((sums[there] ** 2 / counts[there]).sum())
