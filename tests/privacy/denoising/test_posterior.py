"""The posterior over candidates: equal to its definition, and better than what it starts from."""

from __future__ import annotations

import pytest
import torch

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import DChi, Gaussian, OwnerSecret, Pac
from fedsplit.privacy.denoising.candidate_search import search
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.denoising.posterior import Denoiser, unigram_log_prior

V, D, P = 3000, 12, 5
G = torch.Generator().manual_seed(0)
TABLE = torch.randn(P, V, D, generator=G)
CANDIDATES = MatrixCandidates(TABLE)
LENGTHS = [5, 1, 3, 4]
IDS = [torch.randint(0, V, (n,), generator=G) for n in LENGTHS]
CLEAN = [TABLE[torch.arange(len(x)), x] for x in IDS]
PRIOR = torch.log_softmax(2 * torch.randn(V, generator=G), 0)


def noisy(mechanism, samples=CLEAN):
    secret = OwnerSecret.for_simulation(0, "posterior")
    return [mechanism.privatise(x, secret.stream(i)) for i, x in enumerate(samples)]


@pytest.mark.parametrize("eta", [0.5, 4.0, 60.0])
@pytest.mark.parametrize("prior", [None, PRIOR])
def test_mean_and_map_are_the_definition(eta: float, prior: torch.Tensor | None):
    mechanism = DChi(eta=eta)
    received = noisy(mechanism)

    mean = Denoiser(CANDIDATES, mechanism, prior)(received)
    best, _ = search(
        received, CANDIDATES, 3, log_likelihood=mechanism.log_likelihood, log_prior=prior
    )

    for x, m, b in zip(received, mean, best, strict=True):
        for p in range(len(x)):
            e = TABLE[p].double()
            log = -eta * (x[p].double() - e).norm(dim=1) + (0 if prior is None else prior.double())
            assert torch.allclose(m[p].double(), torch.softmax(log, 0) @ e, atol=1e-4)
            assert b[p, 0] == log.argmax()
            assert set(b[p].tolist()) == set(log.topk(3).indices.tolist())


def test_one_matrix_and_many_blocks_agree(monkeypatch: pytest.MonkeyPatch):
    mechanism = DChi(eta=3.0)
    candidates = MatrixCandidates(TABLE[0])
    received = noisy(mechanism, [TABLE[0, x] for x in IDS])
    whole = Denoiser(candidates, mechanism, PRIOR)(received)

    monkeypatch.setattr("fedsplit.privacy.denoising.candidate_search.VOCAB_BLOCK", 64)
    monkeypatch.setattr("fedsplit.privacy.denoising.candidate_search.QUERY_BLOCK", 3)
    cut = Denoiser(candidates, mechanism, PRIOR)(received)

    assert torch.allclose(torch.cat(whole), torch.cat(cut), atol=1e-5)


@pytest.mark.parametrize(
    "mechanism", [DChi(eta=2.5), Gaussian(epsilon=40.0, delta=1e-5, clip=20.0)]
)
def test_denoising_halves_the_squared_error(mechanism):
    ids = torch.randint(0, 300, (400,), generator=G)
    clean = TABLE[0, :300][ids]
    candidates = MatrixCandidates(TABLE[0, :300])

    received = noisy(mechanism, [clean])
    mean = Denoiser(candidates, mechanism)(received)[0]

    assert (mean - clean).square().sum() < 0.5 * (received[0] - clean).square().sum()


def test_shaped_noise_is_whitened():
    """Noise along one axis is ignored by the posterior, not by the plain distance."""
    scales = torch.tensor([1.0] + [1e-4] * (D - 1), dtype=torch.float64)
    mechanism = Pac(budget=0.005, covariance=torch.diag(scales**2), floor=1e-9)
    received = noisy(mechanism)

    mean = torch.cat(Denoiser(CANDIDATES, mechanism)(received))
    best, _ = search(received, CANDIDATES)

    clean = torch.cat(CLEAN)
    assert (mean - clean).norm() < 0.1 * clean.norm()
    assert (torch.cat(best)[:, 0] != torch.cat(IDS)).sum() >= 5


def test_excluded_tokens_never_come_out():
    prior = unigram_log_prior([[1, 1, 2]], V, exclude=[0, *range(3, V)])

    mean = Denoiser(CANDIDATES, DChi(eta=1.0), prior)(noisy(DChi(eta=1.0)))[0][0]

    a, b = TABLE[0, 1], TABLE[0, 2]
    share = ((mean - b) @ (a - b)) / ((a - b) @ (a - b))
    assert torch.allclose(mean, share * a + (1 - share) * b, atol=1e-5)
    assert 0 <= share <= 1


def test_unigram_prior_is_smoothed_frequency():
    prior = unigram_log_prior([[0, 0, 1], [0]], 3, smoothing=0.5)

    assert prior.exp().tolist() == pytest.approx([3.5 / 5.5, 1.5 / 5.5, 0.5 / 5.5])
    with pytest.raises(ConfigError, match=r"token id=3: must be in 0\.\.2"):
        unigram_log_prior([[3]], 3)
    with pytest.raises(ConfigError, match="smoothing=0"):
        unigram_log_prior([], 3, smoothing=0)


def test_dtype_is_kept():
    received = [x.bfloat16() for x in noisy(DChi(eta=2.0))]

    assert {x.dtype for x in Denoiser(CANDIDATES, DChi(eta=2.0))(received)} == {torch.bfloat16}


def test_misfits_are_refused():
    with pytest.raises(PrivacyError, match=r"log_prior\.shape"):
        Denoiser(CANDIDATES, DChi(eta=1.0), torch.zeros(V + 1))
    with pytest.raises(PrivacyError, match=r"matrix\.shape"):
        Denoiser(CANDIDATES, Pac(budget=1.0, covariance=torch.eye(D + 1)))
