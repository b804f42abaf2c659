"""The affine denoiser: the least-squares estimate, which keeps what the noise spared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsplit.privacy import Mechanism, OwnerSecret, build
from fedsplit.privacy.denoising.learned import Recipe, TrainingPairs
from fedsplit.privacy.denoising.linear import fit_linear

V, D = 60, 12
RECIPE = Recipe(batch=16, max_tokens=8)
G = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(0, V, (8,), generator=G).tolist() for _ in range(80)]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.randn(V, D, generator=torch.Generator().manual_seed(1)) + 3.0

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.rows[ids]


def received(mechanism: Mechanism) -> tuple[Tensor, list[Tensor]]:
    secret = OwnerSecret.for_simulation(1, "received")
    clean = Words().rows[torch.randint(0, V, (200, 6), generator=G)]
    return clean, [mechanism.privatise(x, secret.stream(i)) for i, x in enumerate(clean)]


def test_no_rescaling_about_the_mean_is_better():
    mechanism = build("dchi", eta=2.0)
    clean, rows = received(mechanism)
    x = torch.stack(rows)

    found = fit_linear(TrainingPairs(Words(), mechanism, TEXTS, None, RECIPE))
    error = (torch.stack(found(rows)) - clean).square().mean()

    mean = clean.flatten(0, 1).mean(0)
    scale = ((x - mean) * (clean - mean)).sum() / (x - mean).square().sum()
    assert error < 1.02 * ((x - mean) * scale + mean - clean).square().mean()
    assert error < 0.9 * (clean - mean).square().mean()
    assert 0 < found.unexplained < 0.9


def test_spared_directions_are_kept_and_the_others_taken_out():
    u = torch.eye(D)[:, 3:4]
    mechanism = build("shaped", epsilon=2000.0, delta=1e-5, clip=20.0, spare=0.05, directions=u)
    clean, rows = received(mechanism)

    found = fit_linear(TrainingPairs(Words(), mechanism, TEXTS, None, RECIPE))

    left = (torch.stack(found(rows)) - clean).flatten(0, 1).square().mean(0)
    left = left / clean.flatten(0, 1).var(0)
    assert left[3] < 0.6
    assert (torch.cat([left[:3], left[4:]]) > 0.8).all()


def test_what_was_received_keeps_its_type():
    found = fit_linear(TrainingPairs(Words(), build("dchi", eta=2.0), TEXTS, None, RECIPE), 2)

    assert found([torch.zeros(3, D, dtype=torch.bfloat16)])[0].dtype == torch.bfloat16
    assert found([]) == []
