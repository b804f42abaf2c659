"""Text-to-text: what leaves are clean vectors of tokens, exactly."""

from __future__ import annotations

import pytest
import torch

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy import DChi, NearestToken
from fedsplit.privacy.candidates import MatrixCandidates
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
