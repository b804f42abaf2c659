"""AWM: align the residual dimensions, then compare attention weights by unbiased CKA.

AWM (arXiv 2510.06738, ICLR 2026): the rows of shared vocabulary give a signed permutation between
the two models' residual dimensions (linear assignment); in the common basis each layer's query and
key matrices are compared by unbiased CKA over the d dimensions, which ignores orthogonal maps and
isotropic scale on the head side; the fingerprint is the mean over layers.

Beyond the paper: rotations are aligned too (:func:`fedsplit.fingerprints.methods.align.align`),
V/O and FFN
are reported beside Q/K, and factor pairs are *balanced* first.  CKA of Wq alone changes under the
maps q -> A q, k -> A^-T k that attention cannot see; the balanced features of a pair,
``Wq^T Wk = U S V^T -> (U S^1/2, V S^1/2)``, depend on the product only.

Guarantee: 1 under FFN permutation, V/O and Q/K maps, embedding permutation, sign flips, rotation,
norm rescaling and weight scaling; about 0 for independent weights (unbiased).  It holds under heavy
further training better than anything that reads function.  What breaks it: twins trained on the
same data and tokenizer share attention structure (0.27 for the gutenberg pair, so it is not the
gate's score), new embeddings (no alignment), an expanded or cut width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.fingerprints.methods.aligned_products import (
    alignment_notes,
    centred_stream,
    embedding_alignment,
    product_factors,
)
from fedsplit.fingerprints.methods.base import Fingerprint
from fedsplit.fingerprints.methods.cka import unbiased_kernel
from fedsplit.fingerprints.methods.matching import BlockMatrices, compare_matching_blocks, unit
from fedsplit.fingerprints.view import Similarity, WeightView
from fedsplit.models.layout.projections import BlockProjections


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (d, r) of both sides of a^T b, the same for every factorisation of it.

    Args:
        a: (r, d); b: (r, d).
    """
    qa, ra = torch.linalg.qr(a.T)  # (d, r), (r, r)
    qb, rb = torch.linalg.qr(b.T)
    u, s, vh = torch.linalg.svd(ra @ rb.T)
    root = s.clamp_min(0).sqrt()
    return qa @ u * root, qb @ vh.T * root


def balanced_units(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (d, I) of both sides of an FFN, a unit's scale shared by its ends."""
    first, second = up.norm(dim=1), down.norm(dim=0)  # (I,)
    root = (second / first.clamp_min(1e-30)).sqrt()
    return up.T * root, down / root.clamp_min(1e-30)


def features(block: BlockProjections, *, centre: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both sides' features per kind of weight, (d, p) each, one row a residual dimension."""
    factors = product_factors(block)
    out = {
        "qk": _balanced_heads(*factors["qk"], block.heads),
        "vo": _balanced_heads(*factors["vo"], block.kv_heads),
        "ffn": balanced_units(block.up, block.down),
    }
    if centre:  # what a mean-removing norm behind would drop
        for kind in ("vo", "ffn"):
            first, second = out[kind]
            out[kind] = (first, second - second.mean(0, keepdim=True))
    return out


def _balanced_heads(a: Tensor, b: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return the balanced features of each head's rows of (heads * D, d), side by side."""
    pairs = [balanced(*parts) for parts in zip(a.chunk(heads), b.chunk(heads), strict=True)]
    return torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1)


def kernels(features: Mapping[str, Sequence[Tensor]], turn: Tensor | None) -> BlockMatrices:
    """Return U-centred kernels of unit norm of all features, whose dot products are unbiased CKA.

    Args:
        features: (d, p) by kind, one row a residual dimension.
        turn: maps the rows' dimensions to the other model's basis, if given.
    """
    return {
        kind: tuple(unit(unbiased_kernel(x if turn is None else turn @ x)) for x in sides)
        for kind, sides in features.items()
    }


class AWM(Fingerprint):
    """Mean unbiased CKA of the Q/K weights after alignment; V/O and FFN in ``parts``."""

    name: ClassVar[str] = "awm"
    label: ClassVar[str] = "AWM"
    colour: ClassVar[str] = "#2ca02c"
    strangers: ClassVar[str] = "0.43"
    descendants: ClassVar[str] = "0.974"

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Compare block by block; depths may differ.

        Raises:
            LineageError: for different widths or a missing embedding.
        """
        del tokens
        alignment = embedding_alignment(base, suspect)
        centre = centred_stream(base)
        depths = (base.depth, suspect.depth)
        turn = None if alignment.turn is None else alignment.turn.float().T
        found = compare_matching_blocks(
            depths,
            lambda i: kernels(features(base.block(i), centre=centre), None),
            lambda j: kernels(features(suspect.block(j), centre=centre), turn),
            lambda values: values["qk"],
        )
        notes = alignment_notes(alignment, depths, found)
        return Similarity(found.parts["qk"], found.parts, found.per_block, notes, alignment.fit)
