"""The best rank-r approximation of a matrix, without a full SVD."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.errors import ModelError, check, one_of
from fedsplit.seeding import torch_generator

METHODS = ("auto", "eigen", "randomised", "full")
OVERSAMPLE = 10
POWER = 4
# Above this smaller side the Gram matrix and its eigenvectors are computed in float32.
DOUBLE_UP_TO = 1024
DAMPING = 1e-2
SEEN = 1e-10  # directions of less variance, relative to the largest, the text did not have


@dataclass(frozen=True)
class Factors:
    """``up @ down`` approximates a matrix (m, n) with rank r.

    Attributes:
        up: (m, r).
        down: (r, n).
        error: ``||W - up down||_F / ||W||_F`` (0 for a zero matrix), measured, not estimated.
    """

    up: Tensor
    down: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Columns of ``up``."""
        return int(self.up.shape[1])

    def dense(self) -> Tensor:
        """Return ``up @ down`` (m, n)."""
        return self.up @ self.down


def truncated_rank(rows: int, columns: int, beta: float) -> int:
    """Return r = max(1, floor((1 - beta) min(m, n))) (ScaleOT's SRC)."""
    # 1e-9: (1 - 0.9) * 10 is 0.9999999999999998 in floating point and means 1.
    return max(1, math.floor((1.0 - beta) * min(rows, columns) + 1e-9))


def truncate(weight: Tensor, rank: int, method: str = "auto", seed: int = 0) -> Factors:
    """Return the rank-``rank`` truncation of ``weight``.

    "eigen" projects on the leading eigenvectors of the smaller Gram matrix: O(m n min(m, n)) with
    no division by singular values, so its error is the full SVD's to rounding (with a Gram matrix
    in float32, above 1024, small singular values close to each other may be taken in another
    order).  "randomised" (Halko, Martinsson, Tropp 2011, alg. 4.4: 4 power iterations, 10 extra
    columns) costs O(m n r); its error is the measured one and lies within a few per cent of the
    optimum.  "auto" takes the randomised form for ranks below an eighth of a large matrix.

    Args:
        weight: (m, n), any float dtype.
        rank: r in 1..min(m, n).
        method: one of :data:`METHODS`.
        seed: of the randomised form.

    Raises:
        ConfigError: if the rank or the method is out of range.
    """
    rows, columns = weight.shape
    small = min(rows, columns)
    check(1 <= rank <= small, "rank", rank, f"in 1..{small}")
    one_of("method", method, METHODS)
    exact = torch.float64 if small <= DOUBLE_UP_TO else torch.float32
    matrix = weight.detach().to(exact)
    if method == "auto":
        method = "randomised" if small > DOUBLE_UP_TO and 8 * rank < small else "eigen"
    if method == "full":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        up, down = u[:, :rank] * s[:rank], vh[:rank]
    elif method == "randomised":
        up, down = _randomised(matrix, rank, seed)
    else:
        up, down = _eigen(matrix, rank)
    up, down = up.to(weight.dtype), down.to(weight.dtype)
    norm = float(matrix.norm())
    error = float((matrix - up.to(exact) @ down.to(exact)).norm()) / norm if norm > 0 else 0.0
    return Factors(up.contiguous(), down.contiguous(), error)


def input_root(second: Tensor, damping: float = DAMPING) -> Tensor:
    """Return R (n, n) float64 with R R^T = C + floor I, up to a factor.

    The floor stands for directions that the calibration text did not have.  It is relative to the
    geometric mean of C's spectrum: relative to the mean it would be larger than most of the
    spectrum where a few directions carry nearly all of the variance.

    Args:
        second: C = E x x^T up to a factor, (n, n).
        damping: of the floor.

    Raises:
        ModelError: C is not finite, as where activations overflow.
    """
    if not bool(torch.isfinite(second).all()):
        raise ModelError("moments of a layer's inputs: must be finite; found nan or infinity")
    values, vectors = torch.linalg.eigh(second.to(torch.float64))
    most = float(values[-1])
    if most <= 0:  # nothing came in: every matrix of a rank is as close
        return torch.eye(len(values), dtype=torch.float64)
    values = (values / most).clamp_min(0)
    floor = damping * float(values[values > SEEN].log().mean().exp())
    root: Tensor = vectors * (values + floor).sqrt()
    return root


def truncate_outputs(weight: Tensor, root: Tensor, rank: int, *, seed: int = 0) -> Factors:
    """Return the matrix of rank ``rank`` whose outputs are closest: least E ||(W - W') x||^2.

    With E x x^T = R R^T that is the best approximation of W R, so W' = U_r U_r^T W with U_r its
    leading left singular vectors (as SVD-LLM, Wang et al. 2025, arXiv 2403.07378, up to the way of
    computing it).  The truncation of W itself is the case R = I.  Hidden states of language models
    have few directions of large variance: what W does to them may lie in its small singular values.

    Args:
        weight: (m, n), any float dtype.
        root: R up to a factor, (n, n), see :func:`input_root`.
        rank: r in 1..min(m, n).
        seed: of a randomised truncation.

    Raises:
        ConfigError: if the rank is out of range or R is not (n, n).
    """
    side = weight.shape[1]
    check(tuple(root.shape) == (side, side), "root", tuple(root.shape), f"({side}, {side})")
    matrix = weight.detach().double()
    left = _orthonormal(truncate(matrix @ root.to(matrix), rank, seed=seed).up)  # (m, r)
    up, down = left.to(weight.dtype), (left.T @ matrix).to(weight.dtype)
    norm = float(matrix.norm())
    error = float((matrix - up.double() @ down.double()).norm()) / norm if norm > 0 else 0.0
    return Factors(up.contiguous(), down.contiguous(), error)


def _eigen(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    if rows >= columns:
        basis = _leading(matrix.T @ matrix, rank)  # (n, r)
        return matrix @ basis, basis.T
    basis = _leading(matrix @ matrix.T, rank)  # (m, r)
    return basis, basis.T @ matrix


def _leading(gram: Tensor, rank: int) -> Tensor:
    _, vectors = torch.linalg.eigh(gram)  # ascending
    leading: Tensor = vectors[:, -rank:].flip(1)
    return leading


def _randomised(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    width = min(rank + OVERSAMPLE, rows, columns)
    generator = torch_generator(seed, "emulators.svd", rows, columns, rank)
    test = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    basis = _orthonormal(matrix @ test.to(matrix))
    for _ in range(POWER):
        basis = _orthonormal(matrix.T @ basis)
        basis = _orthonormal(matrix @ basis)
    small = basis.T @ matrix  # (width, n)
    inner = _leading(small @ small.T, rank)  # (width, r)
    left = basis @ inner
    return left, left.T @ matrix


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns).Q
    return q
