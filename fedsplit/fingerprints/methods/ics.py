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
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.errors import LineageError
from fedsplit.fingerprints.methods.base import Fingerprint
from fedsplit.fingerprints.view import Similarity, WeightView, choose_tokens, shared_rows
from fedsplit.models.layout.projections import BlockProjections

CHANNELS = ("a", "b", "f")
LAST = 2


@dataclass(frozen=True)
class Factors:
    """One channel M = left @ right.T, both (K, r); ``shared`` if right is X itself.

    They are float32, or bfloat16 where the weights are (see :class:`ICS`).
    """

    left: Tensor
    right: Tensor
    shared: bool = False

    def matrix(self) -> Tensor:
        """Return the channel itself, (K, K)."""
        return self.left.float() @ self.right.float().T


def _across(one: Tensor, two: Tensor) -> Tensor:
    """Return one^T two, in bfloat16 where both are."""
    if one.dtype == two.dtype:
        return one.T @ two
    return one.float().T @ two.float()


def prepare_rows(rows: Tensor, *, centre: bool) -> Tensor:
    """Return the rows (K, d) with unit root mean square, mean removed first if ``centre``."""
    if centre:
        rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.pow(2).mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)


def _read(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return X W^T + b."""
    out = x @ weight.T
    return out if bias is None else out + bias


def _per_group(block: BlockProjections, per_head: Tensor) -> Tensor:
    """Return (H*D, ...) summed over the query heads of each key/value head, (G*D, ...)."""
    heads = per_head.view(block.heads, -1, *per_head.shape[1:])  # (H, D, ...)
    out = heads.new_zeros(block.kv_heads, *heads.shape[1:])
    out.index_add_(0, torch.tensor(block.kv_of_head), heads)
    return out.flatten(0, 1)


def attention_factors(block: BlockProjections, x: Tensor) -> Factors:
    """Return M_a = (X Wq^T + bq) (X Wk^T)^T summed over heads, key heads repeated.

    Query heads that share a key head are summed before X meets them: the same by linearity, and
    H/G times cheaper.
    """
    bias = block.biases.get("q")
    bias = None if bias is None else _per_group(block, bias)
    return Factors(_read(x, _per_group(block, block.q), bias), _read(x, block.k))


def value_factors(block: BlockProjections, x: Tensor) -> Factors:
    """Return M_b = (X Wv^T + bv) Wo^T X^T, output heads that share values summed."""
    values = _read(x, block.v, block.biases.get("v"))  # (K, G*D)
    return Factors(values, _read(x, _per_group(block, block.o.T)))


def ffn_factors(block: BlockProjections, x: Tensor) -> Factors:
    """Return M_f = (X Wup^T + b) Wdown^T X^T; gated: ((X Wg^T + b) * (X Wu^T + b)) Wdown^T X^T."""
    hidden = _read(x, block.up, block.biases.get("up"))  # (K, I)
    if block.gate is not None:
        hidden *= _read(x, block.gate, block.biases.get("gate"))
    return Factors(_read(hidden, block.down), x, shared=True)


def published_ffn_factors(block: BlockProjections, x: Tensor) -> Factors:
    """Return the public code's gated form, X (Wg * Wu)^T Wd^T X^T: not invariant."""
    first = block.up if block.gate is None else block.up * block.gate
    return Factors(x @ first.T @ block.down.T, x)


def published_attention_factors(block: BlockProjections, x: Tensor) -> Factors:
    """Return the public code's M_a: key heads tiled, no biases."""
    repeat = block.heads // block.kv_heads
    return Factors(x @ block.q.T, x @ block.k.repeat(repeat, 1).T)


def published_value_factors(block: BlockProjections, x: Tensor) -> Factors:
    """Return the public code's M_b: value heads tiled, no biases."""
    repeat = block.heads // block.kv_heads
    return Factors(x @ block.v.repeat(repeat, 1).T @ block.o.T, x)


Memo = dict[tuple[int, int], Tensor]


def inner(one: Factors, two: Factors, memo: Memo | None = None) -> float:
    """Sum of the products of two channels' entries, without building either.

    Args:
        memo: inner products of shared right factors by identity, while these are alive.
    """
    known = memo if memo is not None and one.shared and two.shared else {}
    key = (id(one.right), id(two.right))
    if key not in known:
        known[key] = _across(one.right, two.right)
    return float((_across(one.left, two.left).double() * known[key].double()).sum())


def correlation(one: Factors, two: Factors, memo: Memo | None = None) -> float:
    """Return the Pearson correlation of two channels' entries, exact, without building either.

    Args:
        memo: as for :func:`inner`.

    Raises:
        LineageError: if they were made with different numbers of tokens.
    """
    if one.left.shape[0] != two.left.shape[0]:
        raise LineageError(
            f"tokens={two.left.shape[0]}: the base's fingerprint has {one.left.shape[0]}"
        )
    count = float(one.left.shape[0]) ** 2
    memo = {} if memo is None else memo

    def total(a: Factors) -> float:
        return float(a.left.double().sum(0) @ a.right.double().sum(0))

    s1, s2 = total(one), total(two)
    v1 = inner(one, one, memo) - s1 * s1 / count
    v2 = inner(two, two, memo) - s2 * s2 / count
    if v1 <= 0.0 or v2 <= 0.0:
        return 0.0
    return (inner(one, two, memo) - s1 * s2 / count) / math.sqrt(v1) / math.sqrt(v2)


Maker = Callable[[BlockProjections, Tensor], Factors]
CORRECTED: dict[str, Maker] = {"a": attention_factors, "b": value_factors, "f": ffn_factors}
PUBLISHED: dict[str, Maker] = {
    "a": published_attention_factors,
    "b": published_value_factors,
    "f": published_ffn_factors,
}


def fast_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, p, lambda: False)()) for p in probes)


def _in_bf16(block: BlockProjections) -> BlockProjections:
    """Return the block rounded to bfloat16, norms folded in float32 before."""
    roles = ("q", "k", "v", "o", "up", "gate", "down")
    tensors = {r: t.bfloat16() for r in roles if (t := getattr(block, r)) is not None}
    biases = {r: b.bfloat16() for r, b in block.biases.items()}
    return replace(block, **tensors, biases=biases)


class ICS(Fingerprint):
    """Invariant-terms cosine similarity over the last two blocks.

    Args:
        bf16: multiply weights that are stored as bfloat16 in bfloat16 where the CPU does so fast
            (accumulation stays float32); moves a correlation by less than 1e-4, and a fifth of the
            time.  Weights stored otherwise are always multiplied in float32.
    """

    name: ClassVar[str] = "ics"
    label: ClassVar[str] = "ICS, corrected"
    colour: ClassVar[str] = "#d62728"
    strangers: ClassVar[str] = "0.80"
    descendants: ClassVar[str] = "0.837"
    makers = CORRECTED
    folded = True

    def __init__(self, *, bf16: bool = True) -> None:
        self.bf16 = bf16

    def rows(self, view: WeightView, tokens: Sequence[int]) -> Tensor:
        """Return X, (K, d)."""
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
        short = self.bf16 and view.stored_dtype() == torch.bfloat16 and fast_bf16()
        x = x.bfloat16() if short else x
        for index in range(-min(LAST, view.depth), 0) if blocks is None else sorted(blocks):
            block = view.block(index, fold=self.folded)
            if short:
                block = _in_bf16(block)
            for key, make in self.makers.items():
                yield f"{key}{index}", make(block, x)

    def channels(self, view: WeightView, tokens: Sequence[int]) -> Tensor:
        """Return (6, K, K) z-scored channels, what the picture's encoder reads."""
        found = [f.matrix() for _, f in self.factors(view, tokens)]
        stacked = torch.stack(found)  # (6, K, K)
        flat = stacked.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp_min(1e-12)
        return flat.view_as(stacked)

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Return the mean correlation of the channels: the cosine of the z-scored stacks, exactly.

        Widths may differ: both are K x K seen from the same tokens.

        Raises:
            LineageError: if the suspect lacks tokens of the base's list.
        """
        tokens = tokens if tokens is not None else choose_tokens(shared_rows(base, suspect))
        parts: dict[str, float] = {}
        pairs = zip(self.factors(base, tokens), self.factors(suspect, tokens), strict=False)
        memo: Memo = {}
        for (key, ours), (_, theirs) in pairs:
            parts[key] = correlation(ours, theirs, memo)
        if not parts:
            raise LineageError("blocks=0: nothing to compare")
        return Similarity(sum(parts.values()) / len(parts), parts)


class PublishedICS(ICS):
    """ICS as the public code computes it: norms ignored, weights multiplied elementwise."""

    name: ClassVar[str] = "ics_published"
    label: ClassVar[str] = "ICS, published"
    colour: ClassVar[str] = "#ff9896"
    strangers: ClassVar[str] = "0.41"
    descendants: ClassVar[str] = "0.709"
    makers = PUBLISHED
    folded = False

    def rows(self, view: WeightView, tokens: Sequence[int]) -> Tensor:
        """Return the embedding rows as they are."""
        return view.embeddings(tokens)
