"""Inversion in context: exact against brute force, stronger than MAP where language has order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from fedsplit.attacks import ContextualInversion, MapInversion, score_tokens
from fedsplit.attacks.inversion.contextual import marginals, trigram_marginals
from fedsplit.errors import ConfigError
from fedsplit.privacy import DChi, OwnerSecret
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.denoising.ngram import NgramModel
from fedsplit.privacy.denoising.posterior import unigram_log_prior

V, D = 400, 24
RNG = np.random.default_rng(0)
# A language in which each word has four followers.
FOLLOWERS = RNG.integers(0, V, (V, 4))


def sentences(n: int, length: int = 12) -> list[list[int]]:
    out = []
    for _ in range(n):
        row = [int(RNG.integers(V))]
        while len(row) < length:
            row.append(int(FOLLOWERS[row[-1], RNG.integers(4)]))
        out.append(row)
    return out


@pytest.mark.parametrize("order", [2, 3])
def test_marginals_are_those_of_brute_force(order: int):
    language = NgramModel(sentences(200), V)
    tokens = np.asarray([RNG.choice(V, 3, replace=False) for _ in range(5)])
    emission = RNG.normal(size=(5, 3))

    found = (marginals if order == 2 else trigram_marginals)(tokens, emission, language)

    mass: dict[tuple[int, int], list[float]] = {}
    for path in itertools.product(range(3), repeat=5):
        ids = tokens[np.arange(5), path]
        log = float(language.unigram(ids[0]) + emission[np.arange(5), path].sum())
        for t in range(1, 5):
            if order == 2 or t == 1:
                log += float(language.bigram(ids[t - 1], ids[t]))
            else:
                log += float(language.trigram(ids[t - 2], ids[t - 1], ids[t]))
        for t in range(5):
            mass.setdefault((t, path[t]), []).append(log)
    exact = np.asarray([[logsumexp(mass[t, i]) for i in range(3)] for t in range(5)])
    assert found == pytest.approx(exact, abs=1e-9)


def test_ngrams_are_distributions_and_learn_order():
    language = NgramModel(sentences(500), V, caution=1.0)
    every = np.arange(V)

    for history in (3, 77):
        assert np.exp(language.bigram(history, every)).sum() == pytest.approx(1.0)
        assert np.exp(language.trigram(5, history, every)).sum() == pytest.approx(1.0)
    fresh = sentences(50)
    assert language.perplexity(fresh, 2) < 0.3 * language.perplexity(fresh, 1)
    assert NgramModel([], V).perplexity(fresh, 3) == pytest.approx(V)


@pytest.mark.parametrize("order", [2, 3])
def test_context_makes_the_attack_stronger(order: int):
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    public, private = sentences(800), [torch.tensor(x) for x in sentences(40)]
    mechanism = DChi(2.5)
    secret = OwnerSecret.for_simulation(0, "c")
    received = [mechanism.privatise(table[x], secret.stream(i)) for i, x in enumerate(private)]
    candidates = MatrixCandidates(table)
    language = NgramModel(public, V)

    alone = MapInversion().invert(received, candidates, mechanism, unigram_log_prior(public, V))
    found = ContextualInversion(order, shortlist=32 if order == 2 else 16).invert(
        received, candidates, mechanism, language
    )

    without, best = (score_tokens("x", i, private) for i in (alone, found))
    assert best.interval[0] > without.interval[1]
    assert best.top10 >= best.success


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="order=4"):
        ContextualInversion(4)
    with pytest.raises(ConfigError, match="top_k=10"):
        ContextualInversion(shortlist=5)
    with pytest.raises(ConfigError, match="token id=9"):
        NgramModel([[9]], 9)
