"""The analytic Gaussian mechanism: exact calibration, for every epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedsplit.errors import ConfigError
from fedsplit.privacy.mechanisms.gaussian import (
    Gaussian,
    epsilon_from_ratio,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_ratio,
)
from fedsplit.privacy.secret import SecretStream


def balle_wang(epsilon: float, delta: float) -> float:
    """Return sigma at D = 1 by algorithm 1 of arXiv 1805.06530, written from the paper."""
    phi = stats.norm.cdf

    def b_plus(v: float) -> float:
        return phi(math.sqrt(epsilon * v)) - math.exp(epsilon) * phi(-math.sqrt(epsilon * (v + 2)))

    def b_minus(u: float) -> float:
        return phi(-math.sqrt(epsilon * u)) - math.exp(epsilon) * phi(-math.sqrt(epsilon * (u + 2)))

    delta_0 = b_plus(0.0)
    low, high = 0.0, 1.0
    if delta >= delta_0:
        while b_plus(high) <= delta:
            high *= 2
    else:
        while b_minus(high) > delta:
            high *= 2
    for _ in range(200):
        mid = (low + high) / 2
        if (b_plus(mid) <= delta) if delta >= delta_0 else (b_minus(mid) > delta):
            low = mid
        else:
            high = mid
    sign = -1 if delta >= delta_0 else 1
    alpha = math.sqrt(1 + low / 2) + sign * math.sqrt(low / 2)
    return alpha / math.sqrt(2 * epsilon)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_calibration_is_algorithm_1(epsilon: float, delta: float):
    assert gaussian_ratio(epsilon, delta) == pytest.approx(balle_wang(epsilon, delta), rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0, 100.0])
def test_calibration_is_tight_and_inverts(epsilon: float):
    ratio = gaussian_ratio(epsilon, 1e-6)

    assert gaussian_delta(epsilon, ratio) <= 1e-6
    assert gaussian_delta(epsilon, ratio * 0.999) > 1e-6
    assert gaussian_epsilon(ratio, 1e-6) == pytest.approx(epsilon, rel=1e-6)


def test_classical_formula_would_break_above_one():
    classical = math.sqrt(2 * math.log(1.25 / 1e-5)) / 16.0

    assert gaussian_delta(16.0, classical) > 30e-5
    assert gaussian_delta(0.9, math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.9) <= 1e-5


def test_delta_is_the_privacy_loss_integral():
    """Theorem 8 against its meaning: the mass of P above e^epsilon Q, integrated on a grid."""
    x = np.linspace(-30, 30, 600_001)
    p, q = stats.norm.pdf(x, 0, 1.7), stats.norm.pdf(x, 1, 1.7)

    mass = np.maximum(p - math.exp(0.8) * q, 0).sum() * (x[1] - x[0])

    assert gaussian_delta(0.8, 1.7) == pytest.approx(mass, rel=1e-6)


def test_vectors_are_clipped_and_noised_with_sigma():
    mechanism = Gaussian(epsilon=2.0, delta=1e-5, clip=3.0)
    hidden = torch.cat([torch.full((500, 64), 10.0), torch.zeros(500, 64)])

    sent = mechanism.privatise(hidden, SecretStream(bytes(32)))

    assert sent[:500].mean(0).norm() == pytest.approx(3.0, abs=0.1 * mechanism.sigma * 8)
    assert float(sent[500:].std()) == pytest.approx(mechanism.sigma, rel=0.02)
    clear = mechanism.privatise(hidden, SecretStream(bytes(32)), torch.zeros(1000))
    assert torch.allclose(clear[:500].norm(dim=1), torch.tensor(3.0))
    assert torch.equal(clear[500:], hidden[500:])


def test_views_compose_exactly():
    mechanism = Gaussian(epsilon=1.0, delta=1e-5, clip=1.0)

    assert mechanism.per_token_epsilon(2.0) == pytest.approx(1.0, rel=1e-6)
    assert mechanism.per_token_epsilon(math.inf) == mechanism.per_token_epsilon(2.0)
    four = mechanism.per_token_epsilon(2.0, views=4)
    assert four == pytest.approx(gaussian_epsilon(mechanism.sigma / 4.0, 1e-5))
    assert 1.0 < four < 4.0


@pytest.mark.parametrize("bad", [{"epsilon": 0.0}, {"delta": 1.0}, {"clip": -1.0}, {"delta": 0.0}])
def test_out_of_range_is_refused(bad: dict[str, float]):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Gaussian(**{"epsilon": 1.0, "delta": 1e-5, "clip": 1.0, **bad})


def test_what_is_sent_obeys_epsilon_and_delta():
    """Histograms of real outputs: sum (p - e^eps q)+ over the bins is delta at the worst pair."""
    n, mechanism = 400_000, Gaussian(epsilon=1.0, delta=0.05, clip=2.0)
    h, other = torch.tensor([2.0]), torch.tensor([-7.0])  # the second is clipped to -2
    sent = [
        mechanism.privatise(x.expand(n, 1), SecretStream(bytes([i]) * 32)).numpy().ravel()
        for i, x in enumerate((h, other))
    ]

    edges = np.linspace(-30, 30, 121)
    p, q = (np.histogram(x, bins=edges)[0] / n for x in sent)

    delta = np.maximum(p - math.exp(1.0) * q, 0).sum()
    assert 0.85 * 0.05 < delta < 1.05 * 0.05 + 4 / math.sqrt(n)
    assert np.maximum(p - math.exp(0.5) * q, 0).sum() > 1.3 * 0.05  # and the bound is tight


def test_noise_ratio_sets_the_mean_norm():
    epsilon = epsilon_from_ratio(1.5, 64, 10.0, clip=12.0, delta=1e-5)

    mechanism = Gaussian(epsilon=epsilon, delta=1e-5, clip=12.0)
    noise = mechanism.privatise(torch.zeros(4000, 64), SecretStream(bytes(32)))

    assert float(noise.norm(dim=1).mean()) == pytest.approx(15.0, rel=0.01)
    with pytest.raises(
        ConfigError, match=r"privacy\.noise-ratio=1000000000\.0: must be small enough"
    ):
        epsilon_from_ratio(1e9, 64, 10.0, clip=12.0, delta=1e-5)
