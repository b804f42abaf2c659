"""The statistics that families share: reference values, and arrays like single shares."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, mannwhitneyu

from fedsplit.errors import ConfigError
from fedsplit.statistics import auc, mean_half_width, wilson_bounds, wilson_interval


@pytest.mark.parametrize(("hits", "n"), [(8, 10), (0, 100), (3, 3), (50, 120)])
def test_wilson_is_scipys(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")

    assert wilson_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
    low, high = wilson_bounds(np.full(2, hits / n), np.full(2, float(n)))
    assert (low[1], high[1]) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_nothing_seen_is_nothing_known() -> None:
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_auc_counts_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(1)
    high, low = rng.integers(1, 7, 80).astype(float), rng.integers(0, 6, 120).astype(float)

    assert auc(high, low) == pytest.approx(mannwhitneyu(high, low).statistic / (80 * 120))
    assert auc([0.9, 0.8], [0.1, 0.2]) == 1.0
    assert auc([0.5], [0.5]) == 0.5
    with pytest.raises(ConfigError, match="positives=0"):
        auc([], [1.0])


def test_half_widths_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    drawn = rng.normal(1.0, 2.0, size=(4000, 5))
    covered = [abs(row.mean() - 1.0) <= mean_half_width(row) for row in drawn]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)
    with pytest.raises(ConfigError, match="values=1"):
        mean_half_width([1.0])
