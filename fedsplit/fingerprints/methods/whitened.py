"""Whitened invariants: HuRef's products seen through orthonormalised embeddings.

HuRef's X P X^T weighs the residual directions by the embeddings' spectrum, whose few dominant
directions are the same for every model of the same data: twins score 0.7.  Replacing X = U S V^T by
its orthonormal factor Xo = U V^T weighs all directions alike::

    Y_qk = Xo Wq^T Wk Xo^T     Y_vo = Xo Wv^T Wo^T Xo^T     Y_ffn = Xo W1^T W2^T Xo^T     (K x K)

A rotation R of the residual stream turns Xo into Xo R and P into R^T P R, so Y stays the same
without any alignment; products cancel the inner maps.  So this is an invariant that an owner
can publish (:mod:`fedsplit.fingerprints.evidence.public_file`), that compares models of different
width, and that twins do not fool: V/O and FFN 0.05 for the gutenberg pair.

What breaks it: replaced embeddings; fewer tokens than width (K < d sees K of d directions only);
large changes of the embeddings' small singular directions lower it faster than the aligned
products.  Own construction (not in HuRef or AWM).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.fingerprints.methods.aligned_products import (
    centred_stream,
    product_factors,
    products,
)
from fedsplit.fingerprints.methods.base import Fingerprint
from fedsplit.fingerprints.methods.matching import (
    BlockMatrices,
    compare_matching_blocks,
    mean_cosine,
)
from fedsplit.fingerprints.view import Similarity, WeightView, choose_tokens, shared_rows


def orthonormal_rows(rows: Tensor, *, centre: bool, tolerance: float = 1e-5) -> Tensor:
    """Return the orthonormal factor U V^T of (K, d) rows, without directions below ``tolerance``.

    Args:
        rows: embedding rows.
        centre: remove each row's mean first, as a mean-removing norm would.
    """
    x = rows.double()
    if centre:
        x = x - x.mean(1, keepdim=True)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > tolerance * s[0]
    orthonormal: Tensor = (u[:, kept] @ vh[kept]).float()
    return orthonormal


def whitened_factors(view: WeightView, index: int, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (L, R), both (K, r), with Y = L R^T, for each kind of product of one block."""
    centre = centred_stream(view)
    out = {}
    for kind, (a, b) in product_factors(view.block(index)).items():
        if centre and kind != "qk":
            b = b - b.mean(1, keepdim=True)
        out[kind] = ((x @ a.T @ b), x) if a.shape[0] > a.shape[1] else (x @ a.T, x @ b.T)
    return out


def transfer(one: Tensor, two: Tensor) -> Tensor:
    """Return Xo^T Xo' (d, d'): <Y, Y'> = <P, A P' A^T> with A this, without a K x K matrix."""
    return one.T @ two


def _norm(p: Tensor, own: Tensor) -> float:
    """Return the norm of Y = Xo P Xo^T; infinite where there is none, so that cosines are 0."""
    squared = float((p.double() * (own @ p @ own.T).double()).sum())
    return squared**0.5 if squared > 0 else math.inf


class WhitenedICS(Fingerprint):
    """Mean cosine of the whitened V/O and FFN invariants over all blocks."""

    name: ClassVar[str] = "ics_whitened"
    label: ClassVar[str] = "ICS, whitened"
    colour: ClassVar[str] = "#9467bd"
    strangers: ClassVar[str] = "0.06"
    descendants: ClassVar[str] = "0.959"

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Compare block by block; widths and depths may differ.

        Raises:
            LineageError: if the suspect lacks tokens of the base's list.
        """
        tokens = tokens if tokens is not None else choose_tokens(shared_rows(base, suspect))
        centre = [centred_stream(v) for v in (base, suspect)]
        rows = [
            orthonormal_rows(v.embeddings(tokens), centre=c)
            for v, c in zip((base, suspect), centre, strict=True)
        ]
        cross, one, two = (transfer(*p) for p in (rows, rows[:1] * 2, rows[1:] * 2))

        def ours(i: int) -> BlockMatrices:
            own = products(base.block(i), centre=centre[0])
            return {k: (cross.T @ p @ cross / _norm(p, one),) for k, p in own.items()}

        def theirs(j: int) -> BlockMatrices:
            own = products(suspect.block(j), centre=centre[1])
            return {k: (q / _norm(q, two),) for k, q in own.items()}

        found = compare_matching_blocks((base.depth, suspect.depth), ours, theirs)
        return Similarity(mean_cosine(found.parts), found.parts, found.per_block)
