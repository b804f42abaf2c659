"""Calibrated verdicts."""

from __future__ import annotations

import pytest
import torch

from fedsplit.errors import ConfigError, LineageError
from fedsplit.fingerprints.gate.verdict import (
    NullDistribution,
    VerdictConfig,
    analytic_sd,
    default_null,
    judge,
    judge_public,
    public_null,
    separation,
)
from fedsplit.fingerprints.view import Similarity


def test_analytic_spread_of_random_products() -> None:
    generator = torch.Generator().manual_seed(0)
    width = 24
    p, q = (
        torch.randn(width, 6, generator=generator) @ torch.randn(6, width, generator=generator)
        for _ in range(2)
    )

    def haar() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    cosines = torch.stack(
        [(p * (haar() @ q @ haar())).sum() / p.norm() / q.norm() for _ in range(2000)]
    )
    assert float(cosines.std()) == pytest.approx(analytic_sd(width), rel=0.08)


def test_p_values_are_calibrated_for_few_null_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    alarms = 0
    for _ in range(2000):
        scores = torch.randn(7, generator=generator) * 0.02 + 0.01
        null = NullDistribution(tuple(scores[:6].tolist()))
        alarms += null.p_value(float(scores[6])) <= 0.05
    assert alarms / 2000 == pytest.approx(0.05, abs=0.015)


def test_three_outcomes_and_exit_codes() -> None:
    same = judge(Similarity(0.98, {}, (0.99, 0.98, 0.97)), 64)
    stranger = judge(Similarity(0.01, {}, (0.01, 0.0, 0.02)), 64)
    between = judge(Similarity(0.07, {}, (0.07, 0.07, 0.07)), 64)
    assert (same.verdict, same.exit_code) == ("in_lineage", 0)
    assert (between.verdict, between.exit_code) == ("not_shown", 1)
    assert (stranger.verdict, stranger.exit_code) == ("independent", 2)
    assert same.p_value < 1e-12
    assert same.threshold <= 0.1
    assert judge(Similarity(0.3, {}, (0.3,)), 64).verdict == "in_lineage"
    assert stranger.p_value > 0.05
    assert same.diverged == stranger.diverged == ()


def test_a_score_driven_down_is_not_called_independent() -> None:
    # Trained against the score: far below any stranger's, with embeddings that still fit.
    driven = judge(Similarity(-0.27, {}, (-0.3, -0.25, -0.26)), 64)
    assert (driven.verdict, driven.exit_code) == ("not_shown", 1)
    fitting = Similarity(0.01, {}, (0.01, 0.0, 0.02), (), 0.99)
    assert judge(fitting, 64).verdict == "not_shown"
    strange = Similarity(0.01, {}, (0.01, 0.0, 0.02), (), 0.6)
    assert judge(strange, 64).verdict == "independent"


def test_a_spliced_block_is_localised() -> None:
    found = judge(Similarity(0.66, {}, (0.99, 0.01, 0.98)), 64)
    assert found.verdict == "in_lineage"
    assert found.diverged == (1,)


def test_threshold_is_where_the_p_value_is_alpha() -> None:
    null = default_null(256, 24)
    assert null.p_value(null.threshold(0.01)) == pytest.approx(0.01, rel=1e-3)
    assert null.z(null.mean) == 0.0


def test_a_sketchs_own_spread_is_paid_for() -> None:
    spreads = [public_null(size, 5).sd for size in (8, 16, 32)]
    assert spreads == sorted(spreads, reverse=True)
    assert public_null(32, 12).sd < public_null(32, 1).sd
    same = Similarity(0.97, {}, (0.97, 0.96, 0.98, 0.97, 0.97))
    assert judge_public(same, 64, 16).verdict == "in_lineage"
    twin = judge_public(Similarity(0.08, {}, (0.22, 0.05, 0.03, 0.06, 0.04)), 64, 32)
    assert twin.verdict == "independent"
    assert judge_public(Similarity(0.2, {}, (0.2,) * 5), 64, 32).verdict == "not_shown"
    # a coarse sketch needs a higher score for the same error rate
    assert judge_public(same, 64, 8).threshold > judge_public(same, 64, 32).threshold


def test_sketched_strangers_are_not_called_relatives() -> None:
    """Random weights, sketched anew each time: what the stated false-positive rate is about."""
    generator = torch.Generator().manual_seed(3)
    for size in (16, 32):
        for _ in range(200):
            blocks = torch.randn(5, generator=generator) / size / 2**0.5 + 0.04
            found = Similarity(float(blocks.mean()), {}, tuple(blocks.tolist()))
            assert judge_public(found, 64, size).verdict != "in_lineage"


def test_separation() -> None:
    assert separation([1.0], [0.0, 0.2]) == pytest.approx(0.9 / 0.1414, rel=1e-3)


def test_bad_input() -> None:
    with pytest.raises(LineageError, match="two or more"):
        NullDistribution((0.1,))
    with pytest.raises(LineageError, match="finite"):
        NullDistribution((0.1, float("nan")))
    with pytest.raises(ConfigError, match="alpha"):
        VerdictConfig(alpha=0.0)
    with pytest.raises(ConfigError, match="depth"):
        public_null(32, 0)
