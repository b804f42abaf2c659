"""Rows are bounded before noise: what that promises, and what it costs where nothing is long."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedsplit.config import PrivacyConfig
from fedsplit.errors import ConfigError
from fedsplit.privacy import MECHANISMS, OwnerSecret, SamplePerturber, build, build_mechanism
from fedsplit.privacy.mechanisms.base import clip_rows
from tests.contracts.test_mechanisms import HIDDEN, PARAMS

SECRET = OwnerSecret.for_simulation(0, "clip")
NOISY = sorted(name for name, row in MECHANISMS.items() if row.protects())
IDS = torch.arange(9)


class Words(nn.Module):
    """A bottom of a word table alone, a few of whose words are very long."""

    def __init__(self, long: float, width: int = 32, vocab: int = 2048) -> None:
        super().__init__()
        rows = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0))
        self.rows = rows / rows.norm(dim=1, keepdim=True)
        self.rows[5::100] *= long
        self.hidden_size, self.k, self.vocab = width, 0, vocab

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.rows[ids]


@pytest.mark.parametrize("name", NOISY)
def test_an_owner_hides_rows_no_longer_than_the_bound(name: str) -> None:
    """A row a thousand times longer leaves as the same row at the bound does."""
    mechanism = build(name, **PARAMS[name], row_clip=2.0)
    long, short = 1000 * HIDDEN, clip_rows(1000 * HIDDEN, 2.0)

    sent = [SamplePerturber(mechanism, SECRET, "b").view(rows, IDS) for rows in (long, short)]

    assert short.norm(dim=1).max() <= 2.0 * (1 + 1e-6)
    assert torch.equal(mechanism.covered(long, IDS), short)
    if mechanism.adds_noise:  # the same noise on the same rows, but for rounding when clipped twice
        assert (sent[0].rows - short).norm(dim=1).max() < 1000
    assert mechanism.describe()["row_clip"] == 2.0
    assert "row_clip" not in build(name, **PARAMS[name]).describe()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_within_the_bound_keep_their_bits(dtype: torch.dtype) -> None:
    rows = HIDDEN.to(dtype)
    bound = float(rows.double().norm(dim=1).median())

    clipped = clip_rows(rows, bound)

    within = rows.double().norm(dim=1) <= bound
    assert torch.equal(clipped[within], rows[within])
    rest = clipped[~within].double().norm(dim=1)
    assert torch.allclose(rest, torch.full_like(rest, bound), rtol=1e-2)
    assert torch.equal(clip_rows(rows, 0.0), rows)


@pytest.mark.parametrize("name", [n for n in NOISY if n not in ("nearest-token", "shaped")])
def test_a_ratio_is_to_the_bound_and_cannot_be_shortened_by_the_bottom(name: str) -> None:
    """Words 3,000 times as long leave the median alone; noise still covers the longest row."""
    for long in (1.0, 3000.0):
        bottom = Words(long)
        config = PrivacyConfig(mechanism=name, row_clip="auto", noise_ratio=6.0)
        mechanism = build_mechanism(config, bottom, 2048)
        assert mechanism.row_clip == pytest.approx(1.0, rel=1e-3)
        assert mechanism.noise_ratio(bottom, 2048) == pytest.approx(6.0, rel=2e-3)
        rows = bottom.rows[:200]
        stream = SECRET.stream(name, int(long))
        noise = mechanism.privatise_sample(rows, torch.arange(200), stream) - clip_rows(rows, 1.0)
        assert float(noise.norm(dim=1).mean()) >= 0.97 * 6.0


@pytest.mark.parametrize("name", ["dchi", "gaussian"])
def test_the_bound_caps_what_any_two_tokens_can_differ_by(name: str) -> None:
    free, clipped = (build(name, **PARAMS[name], **more) for more in ({}, {"row_clip": 0.5}))

    assert clipped.per_token_epsilon(0.3) == free.per_token_epsilon(0.3)
    if name == "dchi":
        assert clipped.per_token_epsilon(math.inf) == free.per_token_epsilon(1.0)
        assert "clipped to 0.5" in clipped.guarantee()


def test_pac_bounds_the_information_of_any_text_within_the_bound() -> None:
    """Where a covariance leaves a direction bare, the bound is that direction's."""
    covariance = torch.diag(torch.tensor([1.0] + [1e-9] * 15))
    mechanism = build("pac", budget=0.5, covariance=covariance, row_clip=1.0)

    told = float(mechanism.guarantee().split("at most ")[-1].split(" nats")[0])

    along = torch.zeros(16, 16)
    along[15, 15] = 1.0  # all the variance that rows of length 1 can have, in the worst direction
    assert 0 < mechanism.information(along) <= told
    free = build("pac", budget=0.5, covariance=covariance)
    assert mechanism.mean_noise_norm(16) < 0.4 * free.mean_noise_norm(16)


def test_a_bound_is_a_length() -> None:
    with pytest.raises(ConfigError, match=r"row_clip=-1\.0"):
        build("dchi", eta=1.0, row_clip=-1.0)
    config = PrivacyConfig(mechanism="dchi", row_clip="auto", eta=1.0)
    bottom = Words(1.0)
    bottom.rows.zero_()
    with pytest.raises(ConfigError, match="rows are all 0"):
        build_mechanism(config, bottom, 2048)
