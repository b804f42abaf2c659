"""The best affine estimate of clean vectors from noisy ones: Wiener's filter, row by row.

    E~[e | x] = m_e + (x - m_x) W,    W = (S_xx + ridge)^-1 S_xe,

with the moments of pairs that anyone makes from public text and the announced mechanism (Wiener,
1949).  It knows no words, so it is far from the posterior where the noise is isotropic; it costs
one ``d x d`` product per token, needs no candidates, and where a mechanism spares directions
(:mod:`fedsplit.privacy.mechanisms.shaped`) it keeps these and takes all others out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.privacy.denoising.learned import TrainingPairs

RIDGE = 1e-6
"""Relative to the mean variance of what is received: for directions that public text lacks."""


@dataclass(frozen=True)
class LinearDenoiser:
    """An affine map of received rows.

    Attributes:
        received: mean noisy row, ``(d,)`` float64.
        clean: mean clean row, ``(d,)`` float64.
        weight: W, ``(d, d)`` float64.
        unexplained: share of the clean rows' variance that is left unexplained.
    """

    received: Tensor
    clean: Tensor
    weight: Tensor
    unexplained: float

    def __call__(self, representations: Sequence[Tensor]) -> list[Tensor]:
        """Return the estimate of each token's clean vector, per sample ``(T_i, d)``."""
        return [
            ((x.detach().double() - self.received) @ self.weight + self.clean).to(x)
            for x in representations
        ]


def fit_linear(pairs: TrainingPairs, batches: int = 64) -> LinearDenoiser:
    """Return the least-squares affine map from noisy to clean rows of public text.

    Args:
        pairs: makes them.
        batches: of pairs; a few times as many rows as ``d`` are enough.
    """
    noisy, clean = [], []
    for step in range(batches):
        x, e, mask = pairs.batch(step)
        noisy.append(x[mask.bool()].double())
        clean.append(e[mask.bool()].double())
    x, e = torch.cat(noisy), torch.cat(clean)  # (N, d) both
    mean_x, mean_e = x.mean(0), e.mean(0)
    x, e = x - mean_x, e - mean_e
    moments = x.T @ x / len(x)
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    weight = torch.linalg.solve(moments, x.T @ e / len(x))
    left = float((x @ weight - e).square().sum() / e.square().sum())
    return LinearDenoiser(mean_x, mean_e, weight, left)
