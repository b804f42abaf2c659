"""HuRef's invariant terms, corrected, and their cosine (ICS).

HuRef (arXiv 2312.04828), section 4, per block, X = embedding rows of K fixed tokens, weights
(out, in)::

    M_a = X Wq^T Wk X^T      M_b = X Wv^T Wo^T X^T      M_f = X W1^T W2^T X^T

for the last two blocks, stacked to (6, K, K); ICS z-scores each channel and takes the cosine.

Corrections to the published code: the norms in front are folded in, so that moving scale between a
norm and its projection changes nothing; a gated FFN uses ``((X Wg^T) * (X Wu^T)) Wd^T X^T``, which
survives rotations and sign flips of the embedding space; key/value heads are repeated per query
head; fused QKV is split by its real layout; biases take part where they act (query, value, up and
gate biases; a key bias shifts all of a row's logits alike and is left out); rows of X have unit
root mean square, since what reaches the projections has, and their mean is removed where a
mean-removing norm would.

Invariant under: FFN unit permutation, V/O linear maps, Q/K maps commuting with RoPE, permutation,
sign flips and rotations of the embedding space, norm rescaling, weight scaling.  What breaks it:
it sees learned *function*: independent models with the same data and tokenizer score 0.3-0.6, and
heavy further training wears it down to the level of strangers; see ``aligned_products``.

Every channel is a product L R^T with narrow factors, so the cosine of two fingerprints needs only
``(L^T L') * (R^T R')``, d x d each (exact): the K x K channels are made only for the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.errors import LineageError
from fedsplit.fingerprints.view import Similarity, WeightView, choose_tokens, shared_rows
from fedsplit.models.projections import BlockProjections

CHANNELS = ("a", "b", "f")
LAST = 2


@dataclass(frozen=True)
class Factors:
    """One channel M = left @ right.T, both (K, r); ``shared`` if right is X itself."""

    left: Tensor
    right: Tensor
    shared: bool = False

    def matrix(self) -> Tensor:
        """The channel itself, (K, K)."""
        return self.left @ self.right.T


def prepare_rows(rows: Tensor, *, centre: bool) -> Tensor:
    """Rows (K, d) with unit root mean square, mean removed first if ``centre``."""
    if centre:
        rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.pow(2).mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)


def _read(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b."""
    out = x @ weight.T
    return out if bias is None else out + bias


def _per_group(block: BlockProjections, per_head: Tensor) -> Tensor:
    """(K, H*D) summed over the query heads that share a key/value head -> (K, G*D)."""
    rows = per_head.shape[0]
    heads = per_head.view(rows, block.heads, -1)  # (K, H, D)
    out = heads.new_zeros(rows, block.kv_heads, heads.shape[2])
    out.index_add_(1, torch.tensor(block.kv_of_head), heads)
    return out.flatten(1)


def attention_factors(block: BlockProjections, x: Tensor) -> Factors:
    """M_a = (X Wq^T + bq) (X Wk^T)^T summed over heads, key heads repeated per query head."""
    queries = _read(x, block.q, block.biases.get("q"))  # (K, H*D)
    return Factors(_per_group(block, queries), _read(x, block.k))


def value_factors(block: BlockProjections, x: Tensor) -> Factors:
    """M_b = (X Wv^T + bv) Wo^T X^T, output heads that share values summed."""
    values = _read(x, block.v, block.biases.get("v"))  # (K, G*D)
    return Factors(values, _per_group(block, _read(x, block.o.T)))


def ffn_factors(block: BlockProjections, x: Tensor) -> Factors:
    """M_f = (X Wup^T + b) Wdown^T X^T, gated: ((X Wg^T + b) * (X Wu^T + b)) Wdown^T X^T."""
    hidden = _read(x, block.up, block.biases.get("up"))  # (K, I)
    if block.gate is not None:
        hidden *= _read(x, block.gate, block.biases.get("gate"))
    return Factors(_read(hidden, block.down), x, shared=True)


def published_ffn_factors(block: BlockProjections, x: Tensor) -> Factors:
    """The public code's gated form, X (Wg * Wu)^T Wd^T X^T: not invariant, for comparison."""
    first = block.up if block.gate is None else block.up * block.gate
    return Factors(x @ first.T @ block.down.T, x)


def published_attention_factors(block: BlockProjections, x: Tensor) -> Factors:
    """The public code's M_a: key heads tiled, no biases."""
    repeat = block.heads // block.kv_heads
    return Factors(x @ block.q.T, x @ block.k.repeat(repeat, 1).T)


def published_value_factors(block: BlockProjections, x: Tensor) -> Factors:
    """The public code's M_b: value heads tiled, no biases."""
    repeat = block.heads // block.kv_heads
    return Factors(x @ block.v.repeat(repeat, 1).T @ block.o.T, x)


def correlation(
    one: Factors, two: Factors, memo: dict[tuple[int, int], Tensor] | None = None
) -> float:
    """Pearson correlation of two channels' entries, exact, without building either.

    Args:
        memo: inner products of shared right factors by identity, while these are alive.

    Raises:
        LineageError: if they were made with different numbers of tokens.
    """
    if one.left.shape[0] != two.left.shape[0]:
        raise LineageError(
            f"tokens={two.left.shape[0]}: the base's fingerprint has {one.left.shape[0]}"
        )
    count = float(one.left.shape[0]) ** 2
    memo = {} if memo is None else memo

    def inner(a: Factors, b: Factors) -> float:
        gram = memo.get((id(a.right), id(b.right))) if a.shared and b.shared else None
        if gram is None:
            gram = a.right.T @ b.right
        if a.shared and b.shared:
            memo[id(a.right), id(b.right)] = gram
        return float(((a.left.T @ b.left).double() * gram.double()).sum())

    def total(a: Factors) -> float:
        return float(a.left.double().sum(0) @ a.right.double().sum(0))

    s1, s2 = total(one), total(two)
    v1 = inner(one, one) - s1 * s1 / count
    v2 = inner(two, two) - s2 * s2 / count
    if v1 <= 0.0 or v2 <= 0.0:
        return 0.0
    return (inner(one, two) - s1 * s2 / count) / math.sqrt(v1) / math.sqrt(v2)


Maker = Callable[[BlockProjections, Tensor], Factors]
CORRECTED: dict[str, Maker] = {"a": attention_factors, "b": value_factors, "f": ffn_factors}
PUBLISHED: dict[str, Maker] = {
    "a": published_attention_factors,
    "b": published_value_factors,
    "f": published_ffn_factors,
}


class ICS:
    """Invariant-terms cosine similarity over the last two blocks."""

    name = "ics"
    makers = CORRECTED
    folded = True

    def rows(self, view: WeightView, tokens: Sequence[int]) -> Tensor:
        """X, (K, d)."""
        norm = view.layout.attn_norm
        return prepare_rows(
            view.embeddings(tokens), centre=norm is not None and norm.kind == "layer"
        )

    def factors(
        self, view: WeightView, tokens: Sequence[int], blocks: Iterable[int] | None = None
    ) -> Iterator[tuple[str, Factors]]:
        """Yield ("a-2", factors) ... ("f-1", factors), one block in memory at a time.

        Args:
            blocks: negative indices from the last block; None for the last two.
        """
        x = self.rows(view, tokens)
        for index in range(-min(LAST, view.depth), 0) if blocks is None else sorted(blocks):
            block = view.block(index, fold=self.folded)
            for key, make in self.makers.items():
                yield f"{key}{index}", make(block, x)

    def channels(self, view: WeightView, tokens: Sequence[int]) -> Tensor:
        """(6, K, K) z-scored channels, what the picture's encoder reads."""
        found = [f.matrix() for _, f in self.factors(view, tokens)]
        stacked = torch.stack(found)  # (6, K, K)
        flat = stacked.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp_min(1e-12)
        return flat.view_as(stacked)

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Mean correlation of the channels: the cosine of the z-scored stacks, exactly.

        Widths may differ: both are K x K seen from the same tokens.

        Raises:
            LineageError: if the suspect lacks tokens of the base's list.
        """
        tokens = tokens if tokens is not None else choose_tokens(shared_rows(base, suspect))
        parts: dict[str, float] = {}
        pairs = zip(self.factors(base, tokens), self.factors(suspect, tokens), strict=False)
        memo: dict[tuple[int, int], Tensor] = {}
        for (key, ours), (_, theirs) in pairs:
            parts[key] = correlation(ours, theirs, memo)
        if not parts:
            raise LineageError("blocks=0: nothing to compare")
        return Similarity(sum(parts.values()) / len(parts), parts)


class PublishedICS(ICS):
    """ICS as the public code computes it: norms ignored, weights multiplied elementwise."""

    name = "ics_published"
    makers = PUBLISHED
    folded = False

    def rows(self, view: WeightView, tokens: Sequence[int]) -> Tensor:
        """The embedding rows as they are."""
        return view.embeddings(tokens)
