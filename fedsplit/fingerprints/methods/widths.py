"""Products of models of different width, seen in the directions that both embeddings know.

A model whose residual stream was cut (Sheared LLaMA, Minitron) or widened keeps its products in
part: with X and X' the token rows of the wider and the narrower model and T (d, d') the least
squares map X T = X', the products (:mod:`fedsplit.fingerprints.methods.aligned_products`) of the
wider one are compared as T^T P T with those of the narrower one, by plain cosine.

Guarantee: a cut that keeps some residual directions, with any rotation, permutation, sign or scale,
has T as the exact map, so that uncut heads and hidden units give 1; with a share f of a block's
hidden units kept, the FFN's cosine falls to about the root of f.  For independent products in d'
dimensions it is about N(0, 1/d'); twins of the same data and tokenizer, one of them cut, reached
0.12, since a map with d d' free numbers lays more of them over each other than a rotation does.
What breaks it: replaced embeddings, another
tokenizer, and fewer shared rows than twice the wider width, which determine no map.

Own construction (not in HuRef or AWM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsplit.errors import LineageError
from fedsplit.fingerprints.methods.aligned_products import (
    ALIGN_ROWS,
    centred_stream,
    products,
)
from fedsplit.fingerprints.methods.matching import BlockMatrices, compare_matching_blocks, unit
from fedsplit.fingerprints.view import Similarity, WeightView, shared_rows


def narrowing(wide: WeightView, narrow: WeightView) -> tuple[Tensor, float]:
    """Return (T (d, d'), how well the wider model's rows through T fit the narrower one's).

    The fit is the root of the adjusted coefficient of determination: 1 for a cut model, about 0
    for unrelated rows however few there are.

    Raises:
        LineageError: too few token rows that both have, or none.
    """
    rows = min(shared_rows(wide, narrow), ALIGN_ROWS)
    least = 2 * wide.width
    if rows < least:
        raise LineageError(
            f"{rows} shared token rows: must be >= {least}, twice the wider width, to lay models "
            "of different width over each other"
        )
    x, y = (view.embeddings(range(rows)).double() for view in (wide, narrow))
    if centred_stream(wide):
        x, y = (e - e.mean(1, keepdim=True) for e in (x, y))
    x, y = (e - e.mean(0, keepdim=True) for e in (x, y))
    found: Tensor = torch.linalg.lstsq(x, y).solution
    left = float((y - x @ found).square().sum() / y.square().sum().clamp_min(1e-30))
    adjusted = 1.0 - left * (rows - 1) / (rows - wide.width - 1)
    return found, max(0.0, adjusted) ** 0.5


def compare_widths(base: WeightView, suspect: WeightView) -> Similarity:
    """Compare models of different width block by block; depths may differ too.

    Returns:
        The mean cosine of V/O and FFN products in the narrower model's basis; ``fit`` says how well
        the embeddings agree.

    Raises:
        LineageError: see :func:`narrowing`.
    """
    wide, narrow = (base, suspect) if base.width > suspect.width else (suspect, base)
    turn, fit = narrowing(wide, narrow)
    turn = turn.float()
    centre = centred_stream(base)

    def through(view: WeightView, index: int) -> BlockMatrices:
        own = products(view.block(index), centre=centre)
        if view is wide:
            own = {kind: turn.T @ p @ turn for kind, p in own.items()}
        return {kind: (unit(p),) for kind, p in own.items()}

    depths = (base.depth, suspect.depth)
    found = compare_matching_blocks(
        depths, lambda i: through(base, i), lambda j: through(suspect, j)
    )
    notes = [
        f"widths {base.width} and {suspect.width}: compared in the {narrow.width} directions that "
        f"both embeddings know, rows fit at {fit:.3f}"
    ]
    if depths[0] != depths[1]:
        notes.append(f"{found.matched} of {depths[0]} base blocks matched in {depths[1]}")
    value = sum(found.per_block) / max(1, found.matched)
    return Similarity(value, found.parts, found.per_block, tuple(notes), fit)
