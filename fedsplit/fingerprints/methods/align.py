"""Laying one model's residual basis over another's, by the token embeddings both have.

A suspect may have had its residual stream permuted, sign-flipped or rotated: the function stays and
every weight looks new.  Its embedding rows went through the same map, so they give it away.

AWM (arXiv 2510.06738) aligns dimensions by a linear assignment on shared-vocabulary rows; rotations
need orthogonal Procrustes (Schoenemann 1966).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedsplit.errors import LineageError


@dataclass(frozen=True)
class Alignment:
    """An orthogonal map from the suspect's basis to the base's: base_row ~ suspect_row @ matrix.

    ``fit`` is the cosine of the base's rows with the mapped suspect's; ``kind`` is "identity",
    "assignment" or "procrustes".
    """

    matrix: Tensor
    fit: float
    kind: str

    @property
    def turn(self) -> Tensor | None:
        """The map, or None where the bases are the same."""
        return None if self.kind == "identity" else self.matrix


def _centred(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows - rows.mean(0, keepdim=True)


def _fit(base: Tensor, suspect: Tensor, matrix: Tensor) -> float:
    norm = float(base.norm() * suspect.norm())
    return float((base * (suspect @ matrix)).sum()) / norm if norm > 0 else 0.0


def cross_gram(base: Tensor, suspect: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre both (n, d) row sets; return them and suspect^T base (d, d).

    Raises:
        LineageError: if the shapes differ.
    """
    if base.shape != suspect.shape:
        raise LineageError(
            f"embedding rows {tuple(suspect.shape)}: must be the base's {tuple(base.shape)}"
        )
    b, s = _centred(base), _centred(suspect)
    return b, s, s.T @ b


def identity(base: Tensor, suspect: Tensor) -> Alignment:
    """Return no map: the bases as they are."""
    b, s, _ = cross_gram(base, suspect)
    eye = torch.eye(b.shape[1], dtype=torch.float64)
    return Alignment(eye, _fit(b, s, eye), "identity")


def assignment(base: Tensor, suspect: Tensor) -> Alignment:
    """Return the best signed permutation: the largest sum of absolute column correlations.

    Args:
        base: (n, d) shared token rows of the base.
        suspect: (n, d) the same tokens' rows of the suspect.
    """
    b, s, gram = cross_gram(base, suspect)
    scale = s.norm(dim=0).clamp_min(1e-30)[:, None] * b.norm(dim=0).clamp_min(1e-30)[None]
    corr = (gram / scale).numpy()  # (d suspect, d base)
    rows, cols = linear_sum_assignment(-np.abs(corr))
    matrix = torch.zeros_like(gram)
    signs = np.where(corr[rows, cols] < 0, -1.0, 1.0)
    matrix[torch.from_numpy(rows), torch.from_numpy(cols)] = torch.from_numpy(signs)
    return Alignment(matrix, _fit(b, s, matrix), "assignment")


def procrustes(base: Tensor, suspect: Tensor) -> Alignment:
    """Return the best orthogonal map; with fewer rows than dimensions the rest is arbitrary."""
    b, s, gram = cross_gram(base, suspect)
    u, _, v = torch.linalg.svd(gram)
    matrix = u @ v
    return Alignment(matrix, _fit(b, s, matrix), "procrustes")


ENOUGH = 0.85
ROTATED = 0.95
FEW_ROWS = 0.99


def align(base: Tensor, suspect: Tensor) -> Alignment:
    """Return the simplest map that explains the rows: identity, signed permutation or rotation.

    A rotation has d^2/2 free parameters and fits strangers that share data and tokenizer to some
    degree (0.74 for the gutenberg twins, 0.86 for small twins trained briefly, whose products then
    agree by 0.09 where a permutation gives 0.01), and with few rows it fits anything: it is used
    only where it explains the rows at :data:`ROTATED` with at least 2 d rows, or at
    :data:`FEW_ROWS` with fewer.  A simpler map must reach :data:`ENOUGH` and leave at most 4 times
    the rotation's residual: where a few directions dominate the embedding, some permutation fits a
    rotated model's rows at 0.87.
    """
    rotated = procrustes(base, suspect)
    rows, width = base.shape
    bound = 4.0 * (1.0 - rotated.fit) + 1e-3
    plain = identity(base, suspect)
    if plain.fit >= ENOUGH and 1.0 - plain.fit <= bound:
        return plain
    permuted = assignment(base, suspect)
    if permuted.fit >= ENOUGH and 1.0 - permuted.fit <= bound:
        return permuted
    return rotated if rotated.fit >= (ROTATED if rows >= 2 * width else FEW_ROWS) else permuted
