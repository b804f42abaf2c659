"""The contextual posterior: equal to summing over all texts, and better with a true prior."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import DChi, NearestToken, OwnerSecret
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.denoising.contextual import ContextualDenoiser
from fedsplit.privacy.denoising.ngram import BigramChain
from fedsplit.privacy.denoising.posterior import Denoiser, Touched, unigram_log_prior

V, D, P = 6, 4, 4
G = torch.Generator().manual_seed(0)
TABLE = torch.randn(P, V, D, generator=G)
TEXTS = [[0, 2, 3, 1], [0, 2, 4, 1], [0, 3, 1], [0, 5, 5, 2, 1], [0, 2, 3, 3, 1]]


def sent(ids: list[list[int]], table: Tensor, mechanism: DChi) -> list[Tensor]:
    secret = OwnerSecret.for_simulation(0, "contextual")
    out = []
    for i, x in enumerate(ids):
        at = torch.arange(len(x)) if table.shape[0] > 1 else torch.zeros(len(x), dtype=torch.long)
        out.append(mechanism.privatise(table[at, x], secret.stream(i)))
    return out


def log_text(chain: BigramChain, text: tuple[int, ...]) -> float:
    """Return log P(text) under the chain, from its one-step probabilities alone."""
    one = np.eye(V, dtype=np.float32)
    log = np.log(chain.start[text[0]]) + np.log(chain.end[text[-1]])
    for u, v in itertools.pairwise(text):
        log += np.log(chain.forward(one[[u]])[0, v])
    return float(log)


@pytest.mark.parametrize("positions", [P, 1])
@pytest.mark.parametrize("touched", [None, Touched(0.2, 0.25)])
def test_posterior_is_the_sum_over_all_texts(positions: int, touched: Touched | None):
    table = TABLE[:positions]
    mechanism = DChi(eta=2.0)
    chain = BigramChain(TEXTS, V)
    received = sent([[0, 2], [0, 2, 3, 1], [4], [0, 5, 1]], table, mechanism)

    denoiser = ContextualDenoiser(
        MatrixCandidates(table), mechanism, chain, touched, memory_bytes=8 * V * 5
    )
    means = denoiser(received)

    for x, mean in zip(received, means, strict=True):
        n = len(x)
        total, expected = 0.0, torch.zeros(n, D, dtype=torch.float64)
        for text in itertools.product(range(V), repeat=n):
            at = list(range(n)) if positions > 1 else [0] * n
            e = table[at, list(text)].double()
            r = (x.double() - e).norm(dim=1)
            if touched is None:
                log_p = -2.0 * r
            else:
                full = np.log(0.8) - 2.0 * r
                part = np.log(0.2) - 2.0 * r / 0.25 - D * np.log(0.25)
                log_p = torch.logaddexp(full, part)
            weight = float(np.exp(float(log_p.sum()) + log_text(chain, text)))
            total += weight
            expected += weight * e
        assert torch.allclose(mean.double(), expected / total, atol=1e-4)


def test_chain_is_a_law():
    chain = BigramChain(TEXTS, V, caution=1.0)
    one = np.eye(V, dtype=np.float32)
    rows = chain.forward(one)  # row u: P(. | u) without the mark

    assert np.allclose(rows.sum(1) + chain.end, 1.0, atol=0.2)  # the mark's back-off is additional
    assert chain.start.sum() == pytest.approx(1.0)
    assert (rows > 0).all()
    assert rows[2, 3] > rows[2, 5]
    assert chain.start.argmax() == 0
    assert chain.end.argmax() == 1
    assert np.allclose(chain.backward(one), rows.T, atol=1e-6)


def test_true_context_beats_the_unigram():
    """Text from the chain itself: knowing the neighbours lowers the error."""
    rng = np.random.default_rng(0)
    v, d = 60, 8
    table = torch.randn(v, d, generator=G)
    step = rng.permutation(v)
    texts = []
    for _ in range(300):
        text = [int(rng.integers(v))]
        while len(text) < 8:
            text.append(int(step[text[-1]]) if rng.random() < 0.8 else int(rng.integers(v)))
        texts.append(text)
    mechanism = DChi(eta=2.0)
    candidates = MatrixCandidates(table)
    x = sent(texts[:40], candidates.matrix, mechanism)
    clean = torch.cat([table[t] for t in texts[:40]])
    public = texts[40:]

    context = torch.cat(ContextualDenoiser(candidates, mechanism, BigramChain(public, v, 1.0))(x))
    unigram = torch.cat(Denoiser(candidates, mechanism, unigram_log_prior(public, v))(x))

    def error(mean: Tensor) -> float:
        return float((mean - clean).square().sum())

    assert error(context) < 0.7 * error(unigram)


def test_texts_keep_their_order_dtype_and_groups_do_not_matter():
    mechanism = DChi(eta=1.0)
    chain = BigramChain(TEXTS, V)
    received = sent([[0, 2], [0, 2, 3, 1], [4], [0, 5, 1]], TABLE, mechanism)
    candidates = MatrixCandidates(TABLE)

    whole = ContextualDenoiser(candidates, mechanism, chain)(received)
    cut = ContextualDenoiser(candidates, mechanism, chain, memory_bytes=1)(received)

    assert [x.shape for x in whole] == [x.shape for x in received]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, cut, strict=True))
    half = ContextualDenoiser(candidates, mechanism, chain)([x.bfloat16() for x in received])
    assert {x.dtype for x in half} == {torch.bfloat16}


def test_misfits_are_refused():
    with pytest.raises(ConfigError, match=r"token id=9: must be in 0\.\.5"):
        BigramChain([[9]], V)
    with pytest.raises(ConfigError, match="public texts=0"):
        BigramChain([[]], V)
    with pytest.raises(ConfigError, match=r"chain\.vocab_size=7: must be 6"):
        ContextualDenoiser(MatrixCandidates(TABLE), DChi(eta=1.0), BigramChain(TEXTS, V + 1))
    text = NearestToken(eta=1.0, candidates=MatrixCandidates(TABLE[0]))
    with pytest.raises(PrivacyError, match="a known noise distribution"):
        ContextualDenoiser(MatrixCandidates(TABLE), text, BigramChain(TEXTS, V))
