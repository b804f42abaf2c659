"""DP-SGD on an owner's own parameters: what it costs and what it does to a step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedsplit.errors import PrivacyError
from fedsplit.privacy.dp.accounting import spent_epsilon
from fedsplit.privacy.dp.optimizer import PrivateOptimizer
from fedsplit.privacy.mechanisms.gaussian import gaussian_epsilon
from fedsplit.privacy.secret import OwnerSecret

CLIP = 0.5


def secret(seed: int = 0) -> OwnerSecret:
    return OwnerSecret.for_simulation(seed, "dp")


@pytest.mark.parametrize(("accountant", "slack"), [("rdp", 1.3), ("prv", 1.05)])
@pytest.mark.parametrize(("noise", "steps"), [(2.0, 1), (4.0, 20)])
def test_without_sampling_the_cost_is_that_of_gaussian_noise(
    accountant: str, slack: float, noise: float, steps: int
) -> None:
    """Many steps are one Gaussian mechanism of noise / sqrt(steps), whose epsilon is exact."""
    exact = gaussian_epsilon(noise / math.sqrt(steps), 1e-5)
    spent = spent_epsilon(noise, 1.0, steps, 1e-5, accountant)
    assert exact * 0.99 <= spent <= exact * slack


def test_cost_rises_with_steps_and_rate_and_falls_with_noise() -> None:
    base = spent_epsilon(1.0, 0.05, 100, 1e-5)
    assert 0 == spent_epsilon(1.0, 0.05, 0, 1e-5) < base
    assert spent_epsilon(1.0, 0.05, 200, 1e-5) > base
    assert spent_epsilon(1.0, 0.10, 100, 1e-5) > base
    assert spent_epsilon(2.0, 0.05, 100, 1e-5) < base
    assert spent_epsilon(1.0, 0.05, 100, 1e-7) > base


@pytest.mark.parametrize(
    "arguments",
    [(0.0, 0.1, 1, 1e-5), (1.0, 0.0, 1, 1e-5), (1.0, 1.1, 1, 1e-5), (1.0, 0.1, -1, 1e-5)],
)
def test_arguments_out_of_range(arguments: tuple[float, float, int, float]) -> None:
    with pytest.raises(PrivacyError, match="must be"):
        spent_epsilon(*arguments)


# ---- steps --------------------------------------------------------------------------------------


def parts() -> tuple[list[nn.Parameter], nn.Parameter, torch.optim.Optimizer]:
    own = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
    other = nn.Parameter(torch.ones(2))
    groups = [{"params": [other]}, {"params": own}]
    return own, other, torch.optim.SGD(groups, lr=1.0, weight_decay=0.0)


def samples(n: int, scale: float = 1.0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(3, 4, generator=generator) * scale, torch.randn(5, generator=generator)]
        for _ in range(n)
    ]


def step(
    gradients: list[list[torch.Tensor]], noise: float, seed: int = 0, batch: int | None = None
) -> torch.Tensor:
    own, other, optimizer = parts()
    private = PrivateOptimizer(optimizer, noise_multiplier=noise, clip=CLIP, secret=secret(seed))
    private.step(own, gradients, len(gradients) if batch is None else batch)
    assert torch.equal(other.detach(), torch.ones(2)), "not its turn"
    return -torch.cat([p.detach().flatten() for p in own])  # lr 1 from zero: the gradient used


def flat(sample: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in sample])


def test_each_sample_is_clipped_and_the_mean_is_taken() -> None:
    gradients = [*samples(4), [g * 1e-3 for g in samples(1)[0]]]
    clipped = [flat(g) * min(1.0, CLIP / float(flat(g).norm())) for g in gradients]
    assert float(clipped[-1].norm()) < CLIP / 10, "a short one keeps its length"
    found = step(gradients, noise=1e-7)
    assert torch.allclose(found, torch.stack(clipped).mean(0), atol=1e-6)


def test_no_sample_moves_the_sum_by_more_than_the_clip() -> None:
    gradients = samples(6, scale=1e4)
    whole = 6 * step(gradients, noise=1e-7)
    without = 5 * step(gradients[:-1], noise=1e-7)
    assert float((whole - without).norm()) <= CLIP * 1.001


def test_noise_has_the_announced_deviation_and_one_draw_per_sum() -> None:
    own = nn.Parameter(torch.zeros(20_000))
    gradient = [[torch.full((20_000,), 1e-4)]] * 2
    found = []
    for seed, scale in ((0, 1.0), (0, 1.0), (0, 1.001), (1, 1.0)):
        own.data.zero_()
        optimizer = torch.optim.SGD([own], lr=1.0)
        private = PrivateOptimizer(optimizer, noise_multiplier=3.0, clip=CLIP, secret=secret(seed))
        private.step([own], [[g * scale for g in s] for s in gradient], 2)
        found.append(own.detach().clone())
    assert float(found[0].std()) == pytest.approx(3.0 * CLIP / 2, rel=0.03)
    assert torch.equal(found[0], found[1]), "a repeated step is the same step"
    for other in found[2:]:
        assert abs(float(torch.corrcoef(torch.stack([found[0], other]))[0, 1])) < 0.05


@pytest.mark.parametrize("batch", [0, 2, 4])
def test_a_wrong_count_takes_no_step(batch: int) -> None:
    own, _, optimizer = parts()
    private = PrivateOptimizer(optimizer, noise_multiplier=1.0, clip=CLIP, secret=secret())
    with pytest.raises(PrivacyError, match="samples: must be"):
        private.step(own, samples(3), batch)
    assert all(bool((p == 0).all()) for p in own)


def test_a_gradient_that_is_not_finite_takes_no_step() -> None:
    own, _, optimizer = parts()
    private = PrivateOptimizer(optimizer, noise_multiplier=1.0, clip=CLIP, secret=secret())
    bad = samples(2)
    bad[1][0][0, 0] = float("nan")
    with pytest.raises(PrivacyError, match="NaN"):
        private.step(own, bad, 2)
    assert all(bool((p == 0).all()) for p in own)
