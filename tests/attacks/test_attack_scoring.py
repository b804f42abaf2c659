"""Scoring: positions, specials, baselines, and intervals that cover."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedsplit.attacks.scoring import (
    Inversion,
    clustered_interval,
    score_tokens,
)
from fedsplit.errors import AttackError
from fedsplit.statistics import wilson_interval


def guesses(*rows: list[int]) -> Inversion:
    ids = [torch.tensor(r) for r in rows]
    return Inversion([x.unsqueeze(1) for x in ids], 0.5)


def test_accuracy_is_positional_and_skips_specials():
    truth = [torch.tensor([0, 5, 6, 1]), torch.tensor([0, 5, 1])]

    # Set overlap would call [6, 5] a full hit.
    result = score_tokens("x", guesses([0, 6, 5, 1], [0, 5, 1]), truth, special_ids={0, 1})

    assert result.tokens == 3
    assert result.success == pytest.approx(1 / 3)
    assert result.empirical_privacy == pytest.approx(2 / 3)
    assert result.baseline == pytest.approx(2 / 3)
    assert result.top10 is None
    assert result.per_text == ((0, 2), (1, 1))
    assert result.text_recovery == 0.5
    assert json.loads(json.dumps(result.to_dict()))["seconds"] == 0.5


def test_top10():
    truth = [torch.tensor([3, 7, 50])]
    top = torch.stack([torch.arange(10)] * 3)

    result = score_tokens("x", Inversion([top], 0.0), truth)

    assert (result.success, result.top10) == (0.0, pytest.approx(2 / 3))


def test_wilson_reference_value():
    """8 of 10: 0.490-0.943 (Wilson 1927, as in Newcombe 1998)."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0.0, 100)[1] == pytest.approx(0.0370, abs=1e-4)


def test_clustered_intervals_cover():
    """Samples differ in difficulty (beta), tokens of one fall together: about 95 % coverage."""
    rng = np.random.default_rng(1)
    covered = naive = 0
    runs = 300
    for _ in range(runs):
        total = rng.integers(5, 40, 80).astype(float)
        correct = rng.binomial(total.astype(int), rng.beta(2, 3, 80)).astype(float)
        low, high = clustered_interval(correct, total)
        covered += low <= 0.4 <= high
        low, high = wilson_interval(correct.sum() / total.sum(), total.sum())
        naive += low <= 0.4 <= high

    assert 0.90 <= covered / runs <= 0.99
    assert naive / runs < 0.75  # tokens are not independent


def test_perfect_attack_keeps_a_width():
    low, high = clustered_interval(np.full(5, 10.0), np.full(5, 10.0))

    assert (low < 1.0, high) == (True, 1.0)


def test_misfits_are_refused():
    with pytest.raises(AttackError, match="guesses=1"):
        score_tokens("x", guesses([1]), [torch.tensor([1])] * 2)
    with pytest.raises(AttackError, match=r"guesses\[0\]"):
        score_tokens("x", guesses([1, 2]), [torch.tensor([1])])
    with pytest.raises(AttackError, match="0 tokens besides special"):
        score_tokens("x", guesses([1]), [torch.tensor([1])], special_ids={1})
