"""Covariance-shaped noise: the information bound, and that the allocation is the cheapest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy.mechanisms.calibration import covariance_over
from fedsplit.privacy.mechanisms.pac import (
    Pac,
    budget_from_ratio,
    noise_variances,
)
from fedsplit.privacy.secret import SecretStream

D = 8
G = torch.Generator().manual_seed(0)
MIX = torch.randn(D, D, generator=G, dtype=torch.float64)
COVARIANCE = MIX @ MIX.T


def test_allocation_is_the_formula_and_spends_the_budget():
    values = np.array([4.0, 1.0, 0.25])

    e = noise_variances(values, 2.0)

    assert e.tolist() == pytest.approx([2 * 3.5 / 4, 1 * 3.5 / 4, 0.5 * 3.5 / 4])
    assert (values / (2 * e)).sum() == pytest.approx(2.0)
    assert 0.5 * np.log1p(values / e).sum() < 2.0


def test_no_other_allocation_with_that_budget_has_less_noise():
    rng = np.random.default_rng(0)
    values = rng.gamma(0.5, size=6) + 0.01
    best = noise_variances(values, 1.5).sum()

    for _ in range(200):
        e = rng.gamma(1.0, size=6)
        e *= (values / (2 * e)).sum() / 1.5  # scaled to the same budget
        assert e.sum() >= best * (1 - 1e-9)


def test_mutual_information_of_gaussian_tokens_is_within_the_budget():
    """Sampled output covariance: I(h; h + n) = 0.5 log det(C + N) / det N <= B."""
    mechanism = Pac(budget=3.0, covariance=COVARIANCE)
    zeros = torch.zeros(60_000, D, dtype=torch.float64)

    noise = mechanism.privatise(zeros, SecretStream(bytes(32)))

    n = torch.cov(noise.T)
    information = 0.5 * (torch.logdet(COVARIANCE + n) - torch.logdet(n))
    assert 1.0 < float(information) <= 3.0
    assert float(n.trace()) ** 0.5 == pytest.approx(mechanism.mean_noise_norm(D), rel=0.02)


def test_no_direction_is_left_without_noise():
    flat = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))

    noise = Pac(budget=1.0, covariance=flat).privatise(
        torch.zeros(2000, 4), SecretStream(bytes(32))
    )

    assert float(noise.std(0).min()) > 0.1


def test_identity_follows_the_covariance():
    a, b = Pac(budget=1.0, covariance=COVARIANCE), Pac(budget=1.0, covariance=2 * COVARIANCE)

    assert a.describe() != b.describe()
    assert a.describe() == Pac(budget=1, covariance=COVARIANCE.clone()).describe()


def test_covariance_of_tokens():
    rows = [torch.randn(n, 3, generator=G) for n in (4, 9)]

    assert np.allclose(covariance_over(rows), np.cov(torch.cat(rows).numpy().T), atol=1e-6)


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="budget=0"):
        Pac(budget=0.0, covariance=COVARIANCE)
    with pytest.raises(ConfigError, match=r"\(d, d\)"):
        Pac(budget=1.0, covariance=COVARIANCE[:3])
    with pytest.raises(ConfigError, match="symmetric"):
        Pac(budget=1.0, covariance=MIX)
    with pytest.raises(ConfigError, match="semidefinite"):
        Pac(budget=1.0, covariance=torch.diag(torch.tensor([2.0, -1.0])))
    with pytest.raises(PrivacyError, match=rf"must be \(T, {D}\)"):
        Pac(budget=1.0, covariance=COVARIANCE).privatise(torch.zeros(2, 3), SecretStream(bytes(32)))


def test_information_about_other_text_is_what_gaussian_vectors_share():
    mechanism = Pac(budget=3.0, covariance=COVARIANCE)
    zeros = torch.zeros(60_000, D, dtype=torch.float64)
    noise = torch.cov(mechanism.privatise(zeros, SecretStream(bytes(32))).T)

    for other in (COVARIANCE, 4 * COVARIANCE, torch.eye(D, dtype=torch.float64)):
        expected = 0.5 * (torch.logdet(other + noise) - torch.logdet(noise))
        assert mechanism.information(other) == pytest.approx(float(expected), rel=0.02)

    assert mechanism.information(COVARIANCE) <= 3.0  # what the budget promises
    assert mechanism.information(4 * COVARIANCE) > 3.0  # and what it does not


def test_noise_ratio_sets_the_length():
    budget = budget_from_ratio(1.7, 20.0, COVARIANCE)

    made = Pac(budget=budget, covariance=COVARIANCE)
    assert made.mean_noise_norm(D) == pytest.approx(34, rel=1e-3)
