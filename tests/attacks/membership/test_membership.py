"""Membership inference: an overfitted model tells, one that never saw anybody does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from fedsplit.attacks import Confidences, MembershipInference, Truth, View
from fedsplit.attacks.membership.lira import (
    confidence,
    lira_scores,
    shadow_splits,
    tpr_at,
    train_shadows,
)
from fedsplit.errors import AttackError, ConfigError
from fedsplit.statistics import auc

N, D = 300, 60
G = torch.Generator().manual_seed(0)
X = torch.randn(N, D, generator=G) * (0.3 + 2 * torch.rand(N, 1, generator=G))
Y = (X[:, 0] + 2 * torch.randn(N, generator=G) > 0).long()  # half noise: a fit memorises it


def train(members: np.ndarray, number: int) -> np.ndarray:
    """Fit a classifier on the members, return its confidence on everybody."""
    inside = torch.from_numpy(members)
    weight = torch.zeros(D, 2, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(X[inside] @ weight, Y[inside]).backward()
        optimiser.step()
    return confidence(X @ weight, Y)


def score(attack: MembershipInference, seen: Confidences, member: np.ndarray):
    return attack.run(View(confidences=seen), Truth(members=member))


def test_shadows_tell_more_than_the_loss():
    member = shadow_splits(N, 2, seed=7)[0]
    target = train(member, -1)

    loss = score(MembershipInference("loss"), Confidences(target), member)
    attack = MembershipInference("lira", shadows=8)
    lira = score(
        attack, Confidences(target, *train_shadows(train, len(target), attack.shadows)), member
    )

    assert loss.interval[0] > 0.5
    assert lira.success > loss.success
    assert lira.extra["tpr_at_fpr_1"] > 0.02
    assert lira.baseline == 0.5


def test_outsiders_are_chance():
    """Nobody of these was trained on, so who is called a member cannot be told."""
    rng = np.random.default_rng(0)
    pool = np.zeros(N, dtype=bool)
    pool[: N // 2] = True
    target = train(pool, -1)[N // 2 :]

    result = score(MembershipInference("loss"), Confidences(target), rng.random(N // 2) < 0.5)

    assert result.interval[0] < 0.5 < result.interval[1]


def test_reference_values():
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(0, 6, 200).astype(float), rng.random(200) < 0.4

    u = mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert auc(scores[positive], scores[~positive]) == pytest.approx(
        u / (positive.sum() * (~positive).sum())
    )
    assert (
        tpr_at(np.asarray([3.0, 2.0, 1.0, 0.0]), np.asarray([True, False, True, False]), 0) == 0.5
    )
    assert confidence(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))[0] == pytest.approx(3.0)


def test_every_sample_is_in_half_of_the_shadows():
    members = shadow_splits(50, 8)

    assert (members.sum(0) == 4).all()
    assert 0.3 < members.mean(1).min() <= members.mean(1).max() < 0.7


def test_lira_finds_the_nearer_gaussian():
    members = shadow_splits(100, 8)
    shadows = np.where(members, 5.0, 1.0) + np.random.default_rng(0).normal(size=members.shape)

    scores = lira_scores(np.where(np.arange(100) < 50, 5.0, 1.0), shadows, members)

    assert scores[:50].min() > 0 > scores[50:].max()


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="shadows=3"):
        MembershipInference(shadows=3)
    with pytest.raises(AttackError, match="members and others"):
        score(MembershipInference(), Confidences(np.zeros(3)), np.ones(3, dtype=bool))
    with pytest.raises(AttackError, match="shadows: missing"):
        score(MembershipInference("lira"), Confidences(np.zeros(2)), np.asarray([True, False]))
