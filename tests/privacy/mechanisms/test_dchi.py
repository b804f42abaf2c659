"""d_chi noise: the sampler's distribution, its guarantee, and samplers that get it wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy.mechanisms.dchi import DChi, eta_from_ratio, sample_dchi
from fedsplit.privacy.secret import Floats, SecretStream

SHAPES = [(1, 0.5), (2, 3.0), (8, 8.0), (384, 10.0), (1024, 50.0)]


def log_density(noise: Floats, eta: float) -> Floats:
    """Return the log density of noise vectors, shape ``(..., d) -> (...)``, in nats."""
    d = noise.shape[-1]
    log_sphere = math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
    log_norm = d * math.log(eta) - math.lgamma(d) - log_sphere
    return np.asarray(log_norm - eta * np.linalg.norm(noise, axis=-1), dtype=np.float64)


def stream(label: str) -> SecretStream:
    return SecretStream(label.encode().ljust(32, b"."))


def radius_p_value(noise: Floats, eta: float) -> float:
    """Return the KS p-value of the norms against Gamma(shape=d, rate=eta)."""
    radius = stats.gamma(noise.shape[1], scale=1 / eta)
    return float(stats.kstest(np.linalg.norm(noise, axis=1), radius.cdf).pvalue)


@pytest.mark.parametrize(("d", "eta"), SHAPES)
def test_radius_is_gamma(d: int, eta: float):
    noise = sample_dchi(stream(f"radius {d}"), 4000, d, eta)

    assert radius_p_value(noise, eta) > 1e-3


@pytest.mark.parametrize(("d", "eta"), SHAPES[1:])
def test_direction_is_uniform_and_independent_of_radius(d: int, eta: float):
    n = 4000
    noise = sample_dchi(stream(f"direction {d}"), n, d, eta)

    radius = np.linalg.norm(noise, axis=1)
    u = noise / radius[:, None]

    # Rayleigh: n d |mean u|^2 is chi-squared with d degrees of freedom.
    rayleigh = n * d * float((u.mean(axis=0) ** 2).sum())
    assert 1e-3 < stats.chi2.sf(rayleigh, d) < 1 - 1e-3
    # A fixed projection squared is Beta(1/2, (d - 1)/2); its sign is fair.
    axis = np.ones(d) / np.sqrt(d)
    assert stats.kstest((u @ axis) ** 2, stats.beta(0.5, (d - 1) / 2).cdf).pvalue > 1e-3
    assert stats.binomtest(int((u[:, 0] > 0).sum()), n).pvalue > 1e-3
    assert stats.spearmanr(radius, u[:, 0]).pvalue > 1e-3
    # Tokens are independent of each other: neighbours' directions are orthogonal on average.
    cosine = (u[1:] * u[:-1]).sum(axis=1)
    assert abs(cosine.mean()) < 5 / np.sqrt(d * n)


def test_moments_at_the_papers_setting():
    """d = 1024, eta = 50: ||n|| = 20.46 +- 0.64 (REFERENCE section 1)."""
    norm = np.linalg.norm(sample_dchi(stream("moments"), 4000, 1024, 50.0), axis=1)

    assert norm.mean() == pytest.approx(1024 / 50, abs=0.05)
    assert norm.std() == pytest.approx(np.sqrt(1024) / 50, rel=0.05)


def gamma_per_coordinate(rng: np.random.Generator, n: int, d: int, eta: float) -> Floats:
    return rng.gamma(d, 1 / eta, (n, d)) * rng.uniform(-1, 1, (n, d))


def one_radius_per_batch(rng: np.random.Generator, n: int, d: int, eta: float) -> Floats:
    g = rng.standard_normal((n, d))
    return g / np.linalg.norm(g, axis=1, keepdims=True) * rng.gamma(d, 1 / eta)


def rate_and_scale_swapped(rng: np.random.Generator, n: int, d: int, eta: float) -> Floats:
    g = rng.standard_normal((n, d))
    return g / np.linalg.norm(g, axis=1, keepdims=True) * rng.gamma(d, eta, (n, 1))


@pytest.mark.parametrize(
    "wrong", [gamma_per_coordinate, one_radius_per_batch, rate_and_scale_swapped]
)
def test_known_wrong_samplers_fail_the_radius_test(wrong):
    noise = wrong(np.random.default_rng(0), 1000, 64, 5.0)

    assert radius_p_value(noise, 5.0) < 1e-9


@pytest.mark.parametrize(("d", "eta"), SHAPES)
def test_density_ratio_is_bounded_in_closed_form(d: int, eta: float):
    rng = np.random.default_rng(d)
    h, other = rng.standard_normal((2, d))
    sent = h + sample_dchi(stream(f"ratio {d}"), 2000, d, eta)

    ratio = log_density(sent - h, eta) - log_density(sent - other, eta)

    bound = DChi(eta=eta).per_token_epsilon(float(np.linalg.norm(h - other)))
    assert np.abs(ratio).max() <= bound * (1 + 1e-9)


def test_log_density_integrates_to_one():
    grid = np.linspace(-12, 12, 601)
    points = np.stack(np.meshgrid(grid, grid), axis=-1)

    mass = np.exp(log_density(points, 2.0)).sum() * (grid[1] - grid[0]) ** 2

    assert mass == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("d", [1, 2])
def test_what_is_sent_obeys_the_ratio_bound(d: int):
    """Histograms of real outputs under h and h': no bin's ratio is above exp(eta ||h - h'||)."""
    n, eta = 400_000, 1.5
    h, other = torch.zeros(d), torch.full((d,), 0.6)
    mechanism = DChi(eta=eta)
    sent = [
        mechanism.privatise(x.expand(n, d), stream(f"hist {d} {i}")).numpy()
        for i, x in enumerate((h, other))
    ]

    edges = [np.linspace(-3, 3, 25 if d == 1 else 13)] * d
    a, b = (np.histogramdd(x, bins=edges)[0].ravel() for x in sent)
    use = (a >= 200) & (b >= 200)
    log_ratio = np.log(a[use] / b[use])
    error = np.sqrt(1 / a[use] + 1 / b[use])

    bound = eta * float((h - other).norm())
    assert use.sum() >= 20
    assert (np.abs(log_ratio) <= bound + 4.5 * error).all()
    assert np.abs(log_ratio).max() > 0.85 * bound  # and the bound is tight


def test_scale_multiplies_the_noise_token_by_token():
    h = torch.randn(4, 16, dtype=torch.float64)
    mechanism = DChi(eta=2.0)

    full = mechanism.privatise(h, stream("scale")) - h
    half = mechanism.privatise(h, stream("scale"), torch.tensor([1.0, 0.5, 0.0, 1.0])) - h

    assert torch.allclose(half[1], 0.5 * full[1])
    assert torch.equal(half[2], torch.zeros(16, dtype=torch.float64))
    assert torch.equal(half[[0, 3]], full[[0, 3]])


def test_gradient_passes_through_unchanged():
    h = torch.randn(3, 5, requires_grad=True)

    DChi(eta=1.0).privatise(h, stream("grad")).square().sum().backward()

    sent = DChi(eta=1.0).privatise(h.detach(), stream("grad"))
    assert torch.allclose(h.grad, 2 * sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype):
    assert DChi(eta=4.0).privatise(torch.zeros(2, 8, dtype=dtype), stream("t")).dtype == dtype


def test_noise_that_overflows_the_dtype_is_refused():
    with pytest.raises(PrivacyError, match=r"must fit torch\.float16"):
        DChi(eta=1e-5).privatise(torch.zeros(2, 8, dtype=torch.float16), stream("t"))


@pytest.mark.parametrize("eta", [-1.0, 0.0, float("nan"), float("inf")])
def test_eta_out_of_range_is_refused(eta: float):
    with pytest.raises(ConfigError, match=r"must be > 0 \(1/length units of the representation\)"):
        DChi(eta=eta)


def test_noise_ratio_sets_the_mean_norm():
    mechanism = DChi(eta_from_ratio(0.8, 384, median_norm=10.3))

    noise = sample_dchi(stream("noise ratio"), 4000, 384, mechanism.eta)

    assert np.linalg.norm(noise, axis=1).mean() / 10.3 == pytest.approx(0.8, rel=0.01)
    assert mechanism == DChi(eta_from_ratio(0.8, 384, median_norm=10.3 * (1 + 1e-6)))
    with pytest.raises(ConfigError, match="median_norm=0"):
        eta_from_ratio(1.0, 384, 0.0)


def test_views_compose():
    mechanism = DChi(eta=2.0)

    assert mechanism.per_token_epsilon(3.0, views=4) == 24.0
    assert "exp(8 *" in mechanism.guarantee(views=4)
    with pytest.raises(PrivacyError, match="views=0"):
        mechanism.guarantee(views=0)
