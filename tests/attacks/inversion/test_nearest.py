"""Nearest-neighbour inversion: exact, through the bottom, and right about norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedsplit.attacks import ATTACKS
from fedsplit.attacks.inversion.filtered_search import filtered_search
from fedsplit.attacks.inversion.nearest import NearestNeighbour
from fedsplit.attacks.scoring import score_tokens
from fedsplit.errors import PrivacyError
from fedsplit.privacy.denoising.candidate_search import block_top, search
from fedsplit.privacy.denoising.candidates import (
    BottomCandidates,
    MatrixCandidates,
    candidates_through,
)

V, D, P = 5000, 24, 7


class BertLikeBottom(nn.Module):
    """Word + position embeddings, LayerNorm; optionally a mixing block."""

    def __init__(self, positions: bool = True, mixes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word = nn.Embedding(V, D)
        self.position = nn.Embedding(P, D) if positions else None
        self.norm = nn.LayerNorm(D)
        self.mixes = mixes

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.word(ids)
        if self.position is not None:
            h = h + self.position(torch.arange(ids.shape[1]))
        h = self.norm(h)
        return h + h.mean(1, keepdim=True) if self.mixes else h


def samples(seed: int = 0, n: int = 60) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, V, (int(torch.randint(1, P + 1, (1,), generator=g)),), generator=g)
        for _ in range(n)
    ]


def represent(bottom: nn.Module, ids: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [bottom(x.unsqueeze(0), torch.ones(1, len(x)))[0] for x in ids]


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("sizes", [(2500, 5000), (3, 17), (70, 2048), (1, 4500)])
def test_search_is_exact_against_float64_brute_force(k: int, sizes: tuple[int, int]):
    n, v = sizes
    g = torch.Generator().manual_seed(n)
    x, e = torch.randn(n, D, generator=g), 2 * torch.randn(v, D, generator=g)

    ids, squared = search([x], MatrixCandidates(e), k)

    exact = torch.cdist(x.double(), e.double()).square()
    value = exact.topk(min(k, v), dim=1, largest=False).values
    assert torch.allclose(exact.gather(1, ids[0]), value, atol=1e-4)  # up to float32 ties
    assert torch.allclose(squared[0].double(), value, atol=1e-4)
    assert all(len(row.unique()) == min(k, v) for row in ids[0][:50])


def test_sorted_candidates_do_not_break_the_running_top():
    """The worst order for a running bar: every block beats all before it."""
    e = torch.linspace(9, 1, 9000).unsqueeze(1)

    ids, _ = search([torch.zeros(3, 1)], MatrixCandidates(e), 10)

    assert ids[0][0].tolist() == list(range(8999, 8989, -1))


@pytest.mark.parametrize("v", [10, 33, 1000, 2048])
def test_block_top_is_topk(v: int):
    scores = torch.randn(50, v)

    values, at = block_top(scores.clone(), 10)

    assert torch.equal(values.sort(dim=1, descending=True).values, scores.topk(10).values)
    assert torch.equal(scores.gather(1, at), values)


@pytest.mark.parametrize("positions", [True, False])
def test_zero_noise_recovers_everything_through_the_bottom(positions: bool):
    bottom = BertLikeBottom(positions)
    ids = samples()
    candidates = candidates_through(bottom, V, P, memory_bytes=4 * D * P * 700)

    inversion = NearestNeighbour().invert(represent(bottom, ids), candidates)

    assert score_tokens("nearest", inversion, ids).success == 1.0
    assert candidates.positions == (P if positions else 1)
    assert isinstance(candidates, BottomCandidates if positions else MatrixCandidates)


def test_dot_product_would_be_a_different_search():
    torch.manual_seed(0)
    e = torch.randn(V, D) * torch.rand(V, 1)
    x = e[:500]

    by_dot = (x @ e.T).argmax(1)
    ids, _ = search([x], MatrixCandidates(e), 1)

    assert (ids[0][:, 0] == torch.arange(500)).all()
    assert (by_dot == torch.arange(500)).float().mean() < 0.5


def test_word_embeddings_alone_are_the_wrong_candidates():
    bottom = BertLikeBottom()
    ids = samples()
    inversion = NearestNeighbour(top_k=1).invert(
        represent(bottom, ids), MatrixCandidates(bottom.word.weight)
    )

    assert score_tokens("nearest", inversion, ids).success < 0.9


def test_bottom_with_context_is_refused():
    with pytest.raises(PrivacyError, match=r"moves by .* with its neighbours"):
        candidates_through(BertLikeBottom(mixes=True), V, P)


def test_materialised_equals_lazy():
    bottom = BertLikeBottom()
    lazy = candidates_through(bottom, V, P, memory_bytes=4 * D * P * 999)
    whole = lazy.materialise()

    reps = [x + 0.3 * torch.randn_like(x) for x in represent(bottom, samples())]

    a, b = (NearestNeighbour().invert(reps, c) for c in (lazy, whole))
    assert whole.matrix.shape == (P, V, D)
    assert all(torch.equal(x, y) for x, y in zip(a.ids, b.ids, strict=True))


def test_misfits_are_refused():
    candidates = MatrixCandidates(torch.randn(P, 9, D))

    with pytest.raises(PrivacyError, match=f"must be <= {P} positions"):
        search([torch.zeros(P + 1, D)], candidates)
    with pytest.raises(PrivacyError, match=rf"must be \(T, {D}\)"):
        search([torch.zeros(2, D + 1)], candidates)
    with pytest.raises(PrivacyError, match="must be finite"):
        MatrixCandidates(torch.full((3, 2), torch.nan))


def test_table_row():
    assert ATTACKS["nearest"] is NearestNeighbour


@pytest.mark.parametrize(("n", "v", "k"), [(2100, 3000, 1), (70, 2500, 3), (2048, 1024, 1)])
def test_the_filter_changes_no_answer(n: int, v: int, k: int):
    """The survivors are measured exactly."""
    g = torch.Generator().manual_seed(v)
    e = torch.randn(v, D, generator=g)
    x = e[torch.randint(0, v, (n,), generator=g)] + 0.7 * torch.randn(n, D, generator=g)

    found = filtered_search(x, e, k)

    exact = torch.cdist(x.double(), e.double()).topk(k, dim=1, largest=False).indices
    assert found is not None
    assert (found == exact).double().mean() > 0.9999  # float32 ties


def test_a_filter_that_rules_nothing_out_gives_up():
    x = 1e4 + torch.randn(1100, D)

    assert filtered_search(x, 1e4 + torch.randn(3000, D), 1) is None
