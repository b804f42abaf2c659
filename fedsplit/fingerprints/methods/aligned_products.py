"""Weight products in a common residual basis: what separates twins and survives the maps.

Per block, in the basis of the residual stream (d x d)::

    P_qk = Wq^T Wk     P_vo = Wv^T Wo^T     P_ffn = W1^T W2^T

The products cancel head permutations, V/O and Q/K maps, hidden-unit permutations and the norms'
free scales by construction; what is left, a common orthogonal map of the residual stream, is found
from the embedding rows both models have (:mod:`fedsplit.fingerprints.align`).  Then blocks are
compared by plain cosine.  A gated FFN takes W1 = Wup.  The score averages V/O and FFN; Q/K is
reported beside it, because attention patterns are partly dictated by the data (0.16 for the twins).

Why it is the gate's score: HuRef's invariants X P X^T look at the products through the embeddings,
so they compare learned *function*, which two models trained on the same text share (0.66 for the
gutenberg twins); in the aligned basis the weights of twins are as strange to each other as random
ones (0.01-0.02), while a fine-tuned descendant stays at 0.98.

Guarantee: for independent weights in d dimensions the cosine of one product is about N(0, 1/d_eff)
with d_eff of the order of d; see :mod:`fedsplit.fingerprints.gate.verdict`.  What breaks it: a
descendant whose embeddings were replaced (new tokenizer) cannot be aligned, so the answer is
"not shown"; shuffled vocabularies must first be matched by token text.

Source: our own construction on HuRef (arXiv 2312.04828), section 4, and AWM, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.fingerprints.methods.align import ROTATED, Alignment, align, procrustes
from fedsplit.fingerprints.methods.base import Fingerprint
from fedsplit.fingerprints.methods.matching import (
    BlockMatrices,
    BlockSimilarities,
    compare_matching_blocks,
    unit,
)
from fedsplit.fingerprints.view import Similarity, WeightView, same_width, shared_rows
from fedsplit.models.layout.projections import BlockProjections

ALIGN_ROWS = 8192


def product_factors(block: BlockProjections) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A, B) with P = A^T B, A and B (r, d), for each kind of product."""
    width = block.o.shape[1] // block.heads
    grouped = block.o.view(-1, block.heads, width)  # (d, H, D)
    summed = grouped.new_zeros(block.o.shape[0], block.kv_heads, width)
    summed.index_add_(1, torch.tensor(block.kv_of_head), grouped)
    return {
        "qk": (block.q, block.expand(block.k)),
        "vo": (block.v, summed.flatten(1).T),  # (G*D, d)
        "ffn": (block.up, block.down.T),
    }


def products(block: BlockProjections, *, centre: bool = False) -> dict[str, Tensor]:
    """Return the (d, d) products; ``centre`` removes what the next mean-removing norm would."""
    found = {kind: a.T @ b for kind, (a, b) in product_factors(block).items()}
    if centre:
        for kind in ("vo", "ffn"):
            found[kind] = found[kind] - found[kind].mean(1, keepdim=True)
    return found


def centred_stream(view: WeightView) -> bool:
    """Return whether the pre-norms remove the mean, which makes that direction meaningless."""
    norm = view.layout.attn_norm
    return norm is not None and norm.kind == "layer"


def embedding_alignment(base: WeightView, suspect: WeightView, rows: int = ALIGN_ROWS) -> Alignment:
    """Align the suspect's residual basis to the base's on the leading shared token rows.

    Fewer than 2 d rows do not determine a rotation.  Where they fit one, they are joined by the
    rows seen through the products of some blocks, E P and E P^T, which turn with the basis as E
    does; never otherwise, because fitting what is compared afterwards would favour strangers.

    Raises:
        LineageError: for different widths or a missing embedding.
    """
    width = same_width(base, suspect)
    shared = min(shared_rows(base, suspect), rows)
    views = (base, suspect)
    centre = centred_stream(base)
    own = [v.embeddings(range(shared)) for v in views]
    if centre:
        own = [e - e.mean(1, keepdim=True) for e in own]
    found = align(own[0], own[1])
    if found.kind != "procrustes" or shared >= 2 * width or base.depth != suspect.depth:
        return found
    more = procrustes(*(_with_products(v, e, centre) for v, e in zip(views, own, strict=True)))
    return more if more.fit >= ROTATED else found


def _with_products(view: WeightView, rows: Tensor, centre: bool) -> Tensor:
    """Return rows E, E P and E P^T for the products of three blocks, all of unit norm."""
    parts = [rows]
    for index in sorted({0, view.depth // 2, view.depth - 1}):
        for product in products(view.block(index), centre=centre).values():
            parts += [rows @ product, rows @ product.T]
    return torch.cat([p / p.norm().clamp_min(1e-30) for p in parts])


def alignment_notes(
    alignment: Alignment, depths: tuple[int, int], found: BlockSimilarities
) -> tuple[str, ...]:
    """Return what a comparison in a common basis says beside its figures."""
    notes = (f"residual basis by {alignment.kind}, rows fit at {alignment.fit:.3f}",)
    if depths[0] == depths[1]:
        return notes
    return (*notes, f"{found.matched} of {depths[0]} base blocks matched in {depths[1]}")


class AlignedProducts(Fingerprint):
    """Mean cosine of V/O and FFN products after aligning the residual bases."""

    name: ClassVar[str] = "score"
    label: ClassVar[str] = "score (aligned products)"
    colour: ClassVar[str] = "#111111"
    strangers: ClassVar[str] = "0.02"
    descendants: ClassVar[str] = "0.963"

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Compare block by block; of two models one may have lost or gained blocks.

        Raises:
            LineageError: for different widths or a missing embedding.
        """
        del tokens
        alignment = embedding_alignment(base, suspect)
        centre = centred_stream(base)
        depths = (base.depth, suspect.depth)

        turn = None if alignment.turn is None else alignment.turn.float()

        def ours(i: int) -> BlockMatrices:
            return {k: (unit(p),) for k, p in products(base.block(i), centre=centre).items()}

        def theirs(j: int) -> BlockMatrices:
            own = products(suspect.block(j), centre=centre)
            if turn is not None:
                own = {kind: turn.T @ p @ turn for kind, p in own.items()}
            return {kind: (unit(p),) for kind, p in own.items()}

        found = compare_matching_blocks(depths, ours, theirs)
        return Similarity(
            sum(found.per_block) / max(1, found.matched),
            found.parts,
            found.per_block,
            alignment_notes(alignment, depths, found),
            alignment.fit,
        )
