"""What each protection of labels promises, and that its noise is one noise per thing hidden."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, kstest

from fedsplit.config import LabelsConfig
from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy.labels.marvell import Marvell, optimal_spectrum, sum_kl
from fedsplit.privacy.labels.max_norm import MaxNorm
from fedsplit.privacy.labels.randomised_response import RandomisedResponse
from fedsplit.privacy.labels.table import (
    GradientShield,
    build_protection,
    draw_labels,
)
from fedsplit.privacy.secret import OwnerSecret


def secret(seed: int = 0) -> OwnerSecret:
    return OwnerSecret.for_simulation(seed, "labels")


def texts(n: int) -> list[bytes]:
    return [b"text %d" % i for i in range(n)]


# ---- randomised response ------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "classes"), [(0.5, 2), (1.0, 2), (2.0, 5), (4.0, 8)])
def test_likelihood_ratios_keep_to_epsilon(epsilon: float, classes: int) -> None:
    """On fixed pairs of labels: the matrix's own ratio, and the drawn frequencies follow it."""
    protection = RandomisedResponse(epsilon)
    matrix = protection.transition(classes).numpy()
    assert np.allclose(matrix.sum(1), 1.0)
    ratios = matrix[:, None, :] / matrix[None, :, :]
    assert ratios.max() <= math.exp(epsilon) * (1 + 1e-12)
    assert ratios.max() == pytest.approx(math.exp(epsilon)), "less noise would do"
    n = 1500
    for label in (0, classes - 1):
        drawn = draw_labels(protection, secret(), texts(n), torch.full((n,), label), classes)
        counts = np.bincount(drawn.numpy(), minlength=classes)
        for output, count in enumerate(counts):
            assert binomtest(int(count), n, matrix[label, output]).pvalue > 1e-5


def test_a_label_is_drawn_once_for_ever() -> None:
    protection = RandomisedResponse(0.5)
    labels = torch.arange(200) % 3
    first = draw_labels(protection, secret(), texts(200), labels, 3)
    assert torch.equal(first, draw_labels(protection, secret(), texts(200), labels, 3))
    # Not by slot: whatever the order, a text keeps its draw.
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    moved = draw_labels(protection, secret(), [texts(200)[i] for i in order], labels[order], 3)
    assert torch.equal(moved, first[order])
    others = [
        draw_labels(protection, secret(1), texts(200), labels, 3),
        draw_labels(RandomisedResponse(0.51), secret(), texts(200), labels, 3),
    ]
    for other in others:
        # Independent of the first: its keeping tells nothing of the other's.
        kept = (first == labels).double()
        agree = float((kept * (other == labels)).mean())
        product = float(kept.mean() * (other == labels).double().mean())
        assert abs(agree - product) < 0.12


def test_equal_rows_have_draws_of_their_own() -> None:
    n = 400
    rows = [b"one text"] * n
    drawn = draw_labels(RandomisedResponse(1.0), secret(), rows, torch.ones(n).long(), 2)
    assert 0.6 < float(drawn.double().mean()) < 0.86  # 0.731 if they are independent, else 0 or 1


def test_labels_outside_the_classes_are_refused() -> None:
    stream = secret().stream("x")
    for label, classes in ((2, 2), (-1, 2), (0, 1)):
        with pytest.raises(PrivacyError, match="must be in"):
            RandomisedResponse(1.0).relabel(label, classes, stream)
    with pytest.raises(ConfigError, match="epsilon"):
        RandomisedResponse(0.0)


# ---- Marvell ------------------------------------------------------------------------------------


@given(
    v0=st.floats(-5, 1),
    v1=st.floats(-5, 1),
    d=st.sampled_from([1, 2, 5, 64, 384]),
    share=st.floats(0.05, 0.95),
    power=st.floats(-1, 1.5),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_no_noise_of_the_same_power_hides_better(
    v0: float, v1: float, d: int, share: float, power: float, seed: int
) -> None:
    spread, budget = (10**v0, 10**v1), 10**power
    found = optimal_spectrum(spread, d, 1.0, share, budget)
    cost = np.array([1 - share, (d - 1) * (1 - share), share, (d - 1) * share])
    levels = np.array([found.along[0], found.across[0], found.along[1], found.across[1]])
    assert float(cost @ levels) <= budget * (1 + 1e-9)
    assert levels.min() >= 0
    assert levels[0] >= levels[1]
    assert levels[2] >= levels[3]
    assert found.sum_kl <= sum_kl(np.zeros(4), spread, d, 1.0) * (1 + 1e-9)
    generator = np.random.default_rng(seed)
    for _ in range(40):  # anything else that the same power buys
        extra = np.exp(generator.uniform(-8, 3, 4))
        other = np.array([extra[0] + extra[1], extra[1], extra[2] + extra[3], extra[3]])
        if d == 1:
            other[[1, 3]] = 0
        other *= budget / float(cost @ other)
        assert found.sum_kl <= sum_kl(other, spread, d, 1.0) * (1 + 1e-6) + 1e-9


def test_equal_spreads_of_one_dimension_share_the_power_equally() -> None:
    """By symmetry l = P for both classes, so sumKL = 1 / (v + P): a figure worked out by hand."""
    found = optimal_spectrum((0.5, 0.5), 1, 1.0, 0.5, 3.5)
    assert found.along == pytest.approx((3.5, 3.5), rel=1e-4)
    assert found.sum_kl == pytest.approx(1 / 4.0, rel=1e-6)


def gradients(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) < 0.3).long()
    if d == 2:
        logits = torch.randn(n, 2, generator=generator)
        return (logits.softmax(1) - torch.nn.functional.one_hot(labels, 2)) / n, labels
    axis = torch.randn(d, generator=generator)
    rows = (2.0 * labels - 1)[:, None] * axis + 0.1 * torch.randn(n, d, generator=generator)
    return rows / n, labels


@pytest.mark.parametrize("d", [2, 16])
def test_marvell_hides_what_the_clean_gradients_show(d: int) -> None:
    rows, labels = gradients(3000, d)
    noisy = Marvell(8.0).perturb(rows, labels, 0.3, secret().stream("m", d))
    axis = rows[labels == 1].mean(0) - rows[labels == 0].mean(0)

    def separation(values: torch.Tensor) -> float:
        scores = values.double() @ axis.double()
        return float(kstest(scores[labels == 1].numpy(), scores[labels == 0].numpy()).statistic)

    assert separation(rows) == 1.0
    assert separation(noisy) < 0.35
    noise = (noisy - rows).double()
    assert float(noise.square().sum(1).mean()) <= 8.0 * float(axis.square().sum()) * 1.15
    assert float(noise.mean(0).norm() / axis.norm()) < 0.3, "unbiased"
    if d == 2:  # noise stays where gradients of logits can be
        assert float(noisy.sum(1).abs().max()) < 1e-6 * float(noisy.abs().max()) * 10


def test_a_batch_of_one_class_is_not_sent_clean() -> None:
    rows, _ = gradients(400, 2)
    for label in (0, 1):
        own = rows.abs() * torch.tensor([-1.0, 1.0]) * (1 - 2 * label)  # its label's sign alone
        labels = torch.full((400,), label)
        noisy = Marvell(4.0).perturb(own, labels, 0.3, secret().stream("one", label))
        kept = float((noisy.argmin(1) == own.argmin(1)).double().mean())
        assert 0.45 < kept < 0.75


def test_marvell_refuses_more_than_two_classes() -> None:
    rows = torch.randn(4, 3)
    with pytest.raises(PrivacyError, match="must be 0 or 1"):
        Marvell(1.0).perturb(rows, torch.tensor([0, 1, 2, 0]), 0.5, secret().stream("x"))


# ---- max-norm -----------------------------------------------------------------------------------


def test_max_norm_makes_expected_norms_equal_and_stays_unbiased() -> None:
    rows = torch.tensor([[3.0, -3.0], [0.3, -0.3], [-1.0, 1.0], [0.0, 0.0]])
    labels = torch.tensor([1, 1, 0, 0])
    draws = torch.stack(
        [MaxNorm().perturb(rows, labels, 0.5, secret().stream("n", i)) for i in range(1500)]
    ).double()
    squared = draws.square().sum(2).mean(0)
    assert squared[:3].tolist() == pytest.approx([18.0] * 3, rel=0.2)
    assert float(squared[3]) == 0.0
    assert torch.equal(draws[:, 0], rows[0].double().expand(1500, 2)), "the longest is as it was"
    assert torch.allclose(draws.mean(0), rows.double(), atol=0.4)


# ---- one noise per thing hidden -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["marvell", "max-norm"])
def test_the_same_gradients_get_the_same_noise_and_others_get_their_own(name: str) -> None:
    protection = build_protection(LabelsConfig(protection=name))
    rows, labels = gradients(40, 2)
    slots = list(range(40))
    shield = GradientShield(protection, secret(), 0.3)
    once = shield(rows, labels, slots)
    assert torch.equal(once, GradientShield(protection, secret(), 0.3)(rows, labels, slots))
    noise = (once - rows)[:, 0]
    for other_rows, other_slots, other_secret in (
        (rows * (1 + 1e-6), slots, secret()),
        (rows, slots[::-1], secret()),
        (rows, slots, secret(1)),
    ):
        other = GradientShield(protection, other_secret, 0.3)(other_rows, labels, other_slots)
        second = (other - other_rows)[:, 0]
        assert abs(float(torch.corrcoef(torch.stack([noise, second]))[0, 1])) < 0.75
        assert float((second - noise).abs().median()) > 0.05 * float(noise.abs().median())
