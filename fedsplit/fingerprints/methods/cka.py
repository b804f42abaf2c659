"""Centred kernel alignment, biased and unbiased, through features (never n x n unless smaller).

Kornblith et al. 2019 (arXiv 1905.00414), section 3; the unbiased HSIC estimator is Song et al. 2012
(JMLR 13, eq. 5).  The unbiased form is 0 in expectation for independent features whatever their
number, where the biased one tends to 1 as features outnumber samples.
"""

from __future__ import annotations

import math

import torch
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


def u_centred(kernel: Tensor) -> Tensor:
    """Return an (n, n) kernel U-centred: <K~, M~> / (n (n - 3)) is the unbiased HSIC of two.

    Off the diagonal K~_ij = K_ij - (r_i + r_j) / (n - 2) + s / ((n - 1)(n - 2)), r its sums of rows
    and s their sum, both without the diagonal; zero on it (Szekely and Rizzo 2014, Annals of
    Statistics 42(6), eq. 2.8).  In float64.  A kernel that this leaves nothing of but rounding is
    zero.
    """
    n = kernel.shape[0]
    k = kernel.double().clone()
    rounding = torch.finfo(torch.float64).eps * n * float(k.norm())
    k.fill_diagonal_(0.0)
    sums = k.sum(0)
    k -= (sums[:, None] + sums[None]) / (n - 2)
    k += sums.sum() / ((n - 1) * (n - 2))
    k.fill_diagonal_(0.0)
    return k if float(k.norm()) > rounding else torch.zeros_like(k)


def unbiased_kernel(x: Tensor) -> Tensor:
    """Return the U-centred linear kernel (n, n) of features (n, p).

    The cosine of two is unbiased linear CKA; 1 if y = c x Q, Q orthogonal.

    Raises:
        LineageError: if the samples are below 4.
    """
    _same_samples(x, x, 4)
    exact = x.double()
    return u_centred(exact @ exact.T)
