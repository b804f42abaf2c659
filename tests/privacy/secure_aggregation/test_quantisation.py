"""Quantised sums: within the stated bound of the exact mean, never around the end of the range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy.secure_aggregation.numbers import Numbers, occasion_of
from fedsplit.privacy.secure_aggregation.quantisation import Quantiser


@given(
    st.sampled_from([32, 64]),
    st.integers(2, 9),
    st.sampled_from([1e-6, 0.1, 3.0, 1e4]),
    st.sampled_from([1, 7, 65_536]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-3, 1.0, 5.0]),
)
def test_the_mean_is_within_the_stated_error(
    bits: int, owners: int, bound: float, most: int, seed: int, spread: float
) -> None:
    generator = np.random.default_rng(seed)
    quantiser = Quantiser(bits, owners, bound, most)
    values = spread * bound * generator.standard_normal((owners, 40))
    weights = generator.integers(1, most + 1, owners)
    parts = [quantiser.encode(v, int(w)) for v, w in zip(values, weights, strict=True)]
    total = np.sum(parts, axis=0, dtype=quantiser.dtype)
    whole = int(weights.sum())
    exact = (weights[:, None] * np.clip(values, -bound, bound)).sum(0) / whole
    error = np.abs(quantiser.mean(total, whole) - exact).max()
    assert error <= quantiser.error(owners, whole) + 4e-16 * owners * bound


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("owners", [2, 3, 1000])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_numbers_of_all_owners_do_not_wrap_around(
    bits: int, owners: int, sign: float
) -> None:
    quantiser = Quantiser(bits, owners, 0.5, 100)
    part = quantiser.encode(np.array([sign * 1e9]), 100)
    total = (part.astype(object) * owners) % 2**bits
    mean = quantiser.mean(total.astype(quantiser.dtype), 100 * owners)
    assert mean[0] == pytest.approx(sign * 0.5, abs=1e-12)


def test_what_could_wrap_around_is_refused() -> None:
    with pytest.raises(ConfigError, match="most-targets"):
        Quantiser(32, 100_000, 1.0, 65_536)
    with pytest.raises(ConfigError, match="levels"):
        Quantiser(32, 2**22, 1.0, 1)
    with pytest.raises(ConfigError, match="finite"):
        Quantiser(32, 3, 1.0, 1).encode(np.array([np.nan]), 1)
    with pytest.raises(ConfigError, match="weight=2"):
        Quantiser(32, 3, 1.0, 1).encode(np.zeros(1), 2)


SHAPES = {"b": (2, 3), "a": (4,)}


def owner_of(seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    generator = np.random.default_rng(seed)
    changes = {n: 0.01 * generator.standard_normal(s) for n, s in SHAPES.items()}
    metrics: dict[str, float] = {"targets": 10.0 * seed, "num-examples": seed, "steps": 2}
    if seed != 3:  # this owner's policy keeps its loss
        metrics["loss"] = 1.0 + seed
    return changes, metrics


def test_a_sum_says_weights_counts_and_losses() -> None:
    quantiser, numbers = Quantiser(32, 4, 0.1, 1000), Numbers(SHAPES)
    owners = [owner_of(seed) for seed in (1, 2, 3)]
    vectors = [numbers.encode(quantiser, c, m) for c, m in owners]
    found = numbers.decode(quantiser, np.sum(vectors, axis=0, dtype=np.uint32), 3)
    assert (found.owners, found.weight) == (3, 60)
    assert found.counts == {"num-examples": 6, "steps": 6}
    assert found.loss == pytest.approx((10 * 2 + 20 * 3) / 30, abs=1e-4)
    for name in SHAPES:
        exact = sum(m["targets"] * c[name] for c, m in owners) / 60
        assert np.abs(found.changes[name] - exact).max() <= found.error


def test_an_owners_norm_is_bounded() -> None:
    quantiser, numbers = Quantiser(64, 2, 10.0, 10), Numbers(SHAPES)
    changes = {n: np.ones(s) for n, s in SHAPES.items()}
    vector = numbers.encode(quantiser, changes, {"targets": 10}, norm=0.5)
    found = numbers.decode(quantiser, vector, 1)
    length = np.sqrt(sum((c**2).sum() for c in found.changes.values()))
    assert length == pytest.approx(0.5)


def test_foreign_changes_and_a_sum_without_weight_are_refused() -> None:
    quantiser, numbers = Quantiser(32, 2, 1.0, 10), Numbers(SHAPES)
    with pytest.raises(PrivacyError, match="names and shapes"):
        numbers.encode(quantiser, {"a": np.zeros(4)}, {"targets": 1})
    with pytest.raises(PrivacyError, match="weight=0"):
        numbers.decode(quantiser, np.zeros(numbers.size, np.uint32), 2)


def test_settings_of_the_sum_are_part_of_what_owners_sign() -> None:
    flat: dict[str, Any] = {"strategy": "offsite-tuning"}
    one = occasion_of(RunConfig.from_flat(flat), 1, 2)
    same = occasion_of(RunConfig.from_flat({**flat, "train.rounds": 9}), 1, 2)
    other = occasion_of(RunConfig.from_flat({**flat, "secure.bound": 0.2}), 1, 2)
    assert one == same
    assert one.plan != other.plan
