"""Text-to-text: what leaves are clean vectors of tokens, exactly."""

from __future__ import annotations

import pytest
import torch

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import DChi, NearestToken
from fedsplit.privacy.denoising.candidates import MatrixCandidates
from fedsplit.privacy.secret import SecretStream

TABLE = torch.randn(6, 200, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(6) * 7
HIDDEN = TABLE[torch.arange(6), IDS]


def stream() -> SecretStream:
    return SecretStream(b"t" * 32)


@pytest.mark.parametrize("positions", [6, 1])
def test_output_is_the_nearest_candidate_of_the_noisy_vector(positions: int):
    table = TABLE[:positions]
    mechanism = NearestToken(eta=4.0, candidates=MatrixCandidates(table))

    sent = mechanism.privatise(HIDDEN, stream())

    noisy = DChi(eta=4.0).privatise(HIDDEN, stream())
    for p in range(6):
        e = table[p if positions > 1 else 0]
        expected = (noisy[p].double() - e.double()).norm(dim=1).argmin()
        assert torch.equal(sent[p], e[expected])  # bit for bit: no trace of the private vector
        assert mechanism.tokens(HIDDEN, stream())[p] == expected


def test_little_noise_keeps_the_text_and_much_moves_it():
    candidates = MatrixCandidates(TABLE)

    assert torch.equal(NearestToken(1e4, candidates).tokens(HIDDEN, stream()), IDS)
    assert (NearestToken(0.5, candidates).tokens(HIDDEN, stream()) != IDS).sum() >= 4


def test_gradient_is_straight_through_and_output_exact():
    hidden = HIDDEN.clone().requires_grad_()

    sent = NearestToken(2.0, MatrixCandidates(TABLE)).privatise(hidden, stream())
    (sent * torch.arange(16.0)).sum().backward()

    assert torch.equal(hidden.grad, torch.arange(16.0).expand(6, 16))
    clean = NearestToken(2.0, MatrixCandidates(TABLE)).privatise(HIDDEN, stream())
    assert torch.equal(sent.detach(), clean)


def test_misfits_are_refused():
    with pytest.raises(ConfigError, match="candidates='Tensor'"):
        NearestToken(1.0, TABLE)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="must be <= 6 positions"):
        NearestToken(1.0, MatrixCandidates(TABLE)).privatise(torch.zeros(7, 16), stream())
    with pytest.raises(PrivacyError, match=r"must be \(T, 16\)"):
        NearestToken(1.0, MatrixCandidates(TABLE)).privatise(torch.zeros(3, 4), stream())


def test_replacements_obey_the_ratio_bound():
    """Frequencies of every replacement under two tokens: no ratio is above exp(eta distance)."""
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.5], [-2.0, 1.0], [3.0, 3.0]])
    mechanism = NearestToken(eta=1.3, candidates=MatrixCandidates(table))
    n = 120_000
    counts = [
        torch.bincount(
            mechanism.tokens(table[v].expand(n, 2), SecretStream(bytes([v]) * 32)), minlength=5
        ).double()
        for v in (0, 1)
    ]

    log_ratio = (counts[0] / counts[1]).log().abs()
    error = (1 / counts[0] + 1 / counts[1]).sqrt()

    bound = mechanism.per_token_epsilon(1.0)
    assert min(float(c.min()) for c in counts) >= 200
    assert bool((log_ratio <= bound + 4.5 * error).all())
    assert float(log_ratio.max()) > 0.4 * bound


class Bottom(torch.nn.Module):
    """One block of context over words: k > 0."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = TABLE[0][ids]
        return h + 0.5 * h.roll(1, dims=1)


def text_to_text(eta: float = 2.0, **options: object) -> NearestToken:
    return NearestToken(eta, MatrixCandidates(TABLE[0]), Bottom(), **options)  # type: ignore[arg-type]


def test_a_text_leaves_as_the_clean_representation_of_another_text():
    ids = torch.tensor([3, 50, 51, 52, 53, 4])
    mechanism = text_to_text(specials=frozenset({3, 4, 60}))
    one = torch.ones(1, 6)
    hidden = Bottom()(ids[None], one)[0]

    sent = mechanism.privatise_sample(hidden, ids, stream())

    new = mechanism.replace(ids, stream(), None)
    assert torch.equal(sent, Bottom()(new[None], one)[0])
    assert not torch.equal(new, ids)
    assert (new[0], new[-1]) == (3, 4)  # where they always are, and nowhere else
    assert not set(new[1:-1].tolist()) & {3, 4, 60}
    assert torch.equal(text_to_text(1e4).privatise_sample(hidden, ids, stream()), hidden)
    # What leaves depends on the text alone, not on the vectors that go in.
    assert torch.equal(mechanism.privatise_sample(0 * hidden, ids, stream()), sent)


def test_special_ids_inside_a_text_are_no_exception():
    ids = torch.tensor([3, 60, 60, 60, 60, 60, 4])

    new = text_to_text(0.5, specials=frozenset({3, 4, 60})).replace(ids, stream(), None)

    assert not (new[1:-1] == 60).any()


def test_text_needs_words_and_a_frozen_bottom():
    ids = torch.tensor([1, 2])
    hidden = torch.zeros(2, 16)

    with pytest.raises(PrivacyError, match=r"one \(V, d\) matrix"):
        NearestToken(1.0, MatrixCandidates(TABLE), Bottom()).privatise_sample(hidden, ids, stream())
    with pytest.raises(PrivacyError, match="bottom learns: must be frozen"):
        text_to_text().privatise_sample(hidden.clone().requires_grad_(), ids, stream())
    with pytest.raises(PrivacyError, match=r"token id=200: must be in 0\.\.199"):
        text_to_text().privatise_sample(hidden, torch.tensor([1, 200]), stream())
