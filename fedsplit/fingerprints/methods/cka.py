"""Centred kernel alignment, biased and unbiased, through features (never n x n unless smaller).

Kornblith et al. 2019 (arXiv 1905.00414), section 3; the unbiased HSIC estimator is Song et al. 2012
(JMLR 13, eq. 5).  The unbiased form is 0 in expectation for independent features whatever their
number, where the biased one tends to 1 as features outnumber samples.
"""

from __future__ import annotations

import math

from torch import Tensor

from fedsplit.errors import LineageError


def _same_samples(x: Tensor, y: Tensor, least: int) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0] or x.shape[0] < least:
        raise LineageError(
            f"features {tuple(x.shape)} and {tuple(y.shape)}: must be two matrices with the same "
            f"number of rows, >= {least}"
        )


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of two feature matrices, (n, p) and (n, q), in [0, 1].

    Raises:
        LineageError: if the numbers of samples differ.
    """
    _same_samples(x, y, 2)
    x, y = (t.double() - t.double().mean(0, keepdim=True) for t in (x, y))
    cross = float((x.T @ y).pow(2).sum())
    own = float((x.T @ x).pow(2).sum()) * float((y.T @ y).pow(2).sum())
    return cross / math.sqrt(own) if own > 0 else 0.0


def hsic_unbiased(k: Tensor, m: Tensor) -> float:
    """Return the unbiased HSIC of two (n, n) kernels, n >= 4."""
    n = k.shape[0]
    k, m = k.double().clone(), m.double().clone()
    k.fill_diagonal_(0.0)
    m.fill_diagonal_(0.0)
    rows, cols = k.sum(0), m.sum(0)
    value = (
        (k * m).sum()
        + rows.sum() * cols.sum() / ((n - 1) * (n - 2))
        - 2.0 * (rows @ cols) / (n - 2)
    )
    return float(value) / (n * (n - 3))


def unbiased_cka(x: Tensor, y: Tensor) -> float:
    """Return unbiased linear CKA of (n, p) and (n, q); 1 if y = c x Q, Q orthogonal.

    Raises:
        LineageError: if the numbers of samples differ or are below 4.
    """
    _same_samples(x, y, 4)
    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    own = hsic_unbiased(k, k) * hsic_unbiased(m, m)
    return hsic_unbiased(k, m) / math.sqrt(own) if own > 0 else 0.0
