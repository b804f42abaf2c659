"""Averaging views: nothing gained from an owner that draws once, much from one that draws anew."""

from __future__ import annotations

import pytest
import torch

from fedsplit.attacks import AveragingInversion, NearestNeighbour, score_tokens
from fedsplit.attacks.inversion.averaging import average_views
from fedsplit.errors import AttackError
from fedsplit.privacy import DChi, OwnerSecret, SamplePerturber
from fedsplit.privacy.denoising.candidates import MatrixCandidates

V, D, EPOCHS = 500, 24, 9
G = torch.Generator().manual_seed(0)
TABLE = torch.randn(V, D, generator=G)
IDS = [torch.randint(0, V, (12,), generator=G) for _ in range(40)]


def epochs(fresh: bool) -> list[list[torch.Tensor]]:
    """What a server receives: in every epoch, a new perturber, as after a restart."""
    out = []
    for epoch in range(EPOCHS):
        perturber = SamplePerturber(DChi(2.0), OwnerSecret.for_simulation(0, "a"), "table")
        out.append([perturber.perturb(TABLE[x], x, view=epoch * fresh) for x in IDS])
    return out


def test_nothing_is_gained_where_noise_is_drawn_once():
    views = epochs(fresh=False)

    found = AveragingInversion().invert(views, MatrixCandidates(TABLE))
    once = NearestNeighbour().invert(views[0], MatrixCandidates(TABLE))

    assert average_views(views)[1] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(found.top, once.top, strict=True))


def test_fresh_noise_averages_away():
    views = epochs(fresh=True)

    found = score_tokens("a", AveragingInversion().invert(views, MatrixCandidates(TABLE)), IDS)
    once = score_tokens("n", NearestNeighbour().invert(views[0], MatrixCandidates(TABLE)), IDS)

    assert found.interval[0] > once.interval[1]
    means, distinct = average_views(views)
    assert distinct == EPOCHS
    error = [
        (torch.cat(x) - TABLE[torch.cat(IDS)]).square().mean().sqrt() for x in (means, views[0])
    ]
    assert float(error[0] / error[1]) == pytest.approx(EPOCHS**-0.5, rel=0.1)


def test_misfits_are_refused():
    with pytest.raises(AttackError, match="views=0"):
        average_views([])
    with pytest.raises(AttackError, match="same samples"):
        average_views([[torch.zeros(2, 3)], []])
    with pytest.raises(AttackError, match="sample 0"):
        average_views([[torch.zeros(2, 3)], [torch.zeros(1, 3)]])
