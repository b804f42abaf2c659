"""Maximum a posteriori inversion: no worse than the nearest neighbour, better with a prior."""

from __future__ import annotations

import pytest
import torch

from fedsplit.attacks import ATTACKS, MapInversion, NearestNeighbour, score_tokens
from fedsplit.privacy import DChi, NoNoise, OwnerSecret
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.denoising.posterior import unigram_log_prior

V, D = 2000, 24
G = torch.Generator().manual_seed(3)
CANDIDATES = MatrixCandidates(torch.randn(V, D, generator=G))
ZIPF = 1.0 / torch.arange(1, V + 1)
IDS = [torch.multinomial(ZIPF, 15, replacement=True, generator=G) for _ in range(60)]
PUBLIC = torch.multinomial(ZIPF, 50_000, replacement=True, generator=G).tolist()


def received(mechanism):
    secret = OwnerSecret.for_simulation(0, "map")
    table = CANDIDATES.matrix[0]
    return [mechanism.privatise(table[x], secret.stream(i)) for i, x in enumerate(IDS)]


def test_a_prior_makes_the_attack_stronger():
    mechanism = DChi(eta=3.0)
    x = received(mechanism)

    nearest = score_tokens("nearest", NearestNeighbour().invert(x, CANDIDATES), IDS)
    prior = unigram_log_prior([PUBLIC], V)
    best = score_tokens("map", MapInversion().invert(x, CANDIDATES, mechanism, prior), IDS)

    assert best.interval[0] > nearest.interval[1]
    assert best.success > best.baseline
    assert best.top10 >= best.success


@pytest.mark.parametrize("top_k", [1, 10])
def test_a_uniform_prior_is_the_nearest_neighbour(top_k: int):
    mechanism = DChi(eta=3.0)
    x = received(mechanism)

    a = MapInversion(top_k).invert(x, CANDIDATES, mechanism)
    b = NearestNeighbour(top_k).invert(x, CANDIDATES)

    assert torch.equal(torch.cat(a.ids), torch.cat(b.ids))


def test_no_noise_is_read_off():
    x = received(NoNoise())
    prior = unigram_log_prior([PUBLIC], V)

    inversion = MapInversion().invert(x, CANDIDATES, NoNoise(), prior)

    assert score_tokens("map", inversion, IDS).success == 1.0


def test_table_row():
    assert ATTACKS["map"] is MapInversion
