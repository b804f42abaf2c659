"""Blocks of two models compared one by one, where one of them may have lost or gained some.

Every method here compares blocks by cosines of matrices: weight products in a common basis, their
whitened forms, U-centred kernels.  A method says what those matrices are for one block of either
model; each is made once (of models of different depth once for every group of base blocks that
memory holds), and what is left for a pair of blocks is a dot product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("qk", "vo", "ffn")
HELD = 2**30  # bytes of base blocks' matrices held at once, beside the suspect's block at work
# Kind of weight -> matrices whose dot products with the other model's are similarities.
BlockMatrices = Mapping[str, Sequence[Tensor]]


def unit(tensor: Tensor) -> Tensor:
    """Return a tensor over its norm, in float32; zero stays zero."""
    exact = tensor.double()
    scaled: Tensor = exact / exact.norm().clamp_min(1e-300)
    return scaled.float()


def cosine(one: Tensor, two: Tensor) -> float:
    """Return the cosine of two tensors' entries in float64; 0 if one of them is zero."""
    a, b = one.double().flatten(), two.double().flatten()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def mean_cosine(found: Mapping[str, float]) -> float:
    """Return the mean of V/O's and the FFN's similarity."""
    return (found["vo"] + found["ffn"]) / 2


def similarities(ours: BlockMatrices, theirs: BlockMatrices) -> dict[str, float]:
    """Return the mean dot product of two blocks' matrices, by kind of weight."""
    return {
        kind: sum(_dot(a, b) for a, b in zip(mine, theirs[kind], strict=True)) / len(mine)
        for kind, mine in ours.items()
    }


def _dot(one: Tensor, two: Tensor) -> float:
    return float(one.double().flatten() @ two.double().flatten())


@dataclass(frozen=True)
class BlockSimilarities:
    """Similarities of two models' matched blocks.

    Attributes:
        parts: mean over the matched blocks, by kind of weight.
        per_block: of each block of the base; 0 where none of the other model's matches.
        matched: number of matched blocks.
    """

    parts: dict[str, float]
    per_block: tuple[float, ...]
    matched: int


def compare_matching_blocks(
    depths: tuple[int, int],
    ours: Callable[[int], BlockMatrices],
    theirs: Callable[[int], BlockMatrices],
    score: Callable[[Mapping[str, float]], float] = mean_cosine,
    held: int = HELD,
) -> BlockSimilarities:
    """Compare block with block; of two models of different depth in the best order-keeping match.

    Args:
        depths: numbers of blocks of the base and of the suspect.
        ours: the matrices of one block of the base; called once for each.
        theirs: the same of the suspect, called once for each where depths are equal, otherwise once
            for each and each group of base blocks.
        score: what the kinds' similarities say together.
        held: bytes of base blocks that a group may have; a group has at least one.
    """
    n, m = depths
    pairs: list[int | None] = list(range(n))
    if n == m:
        found = {(i, i): similarities(ours(i), theirs(i)) for i in range(n)}
    else:
        found = _every_pair(depths, ours, theirs, held)
        table = torch.zeros(n, m, dtype=torch.float64)
        for at, values in found.items():
            table[at] = max(0.0, score(values))
        pairs = match_blocks(table)
    kept = [None if j is None else found[i, j] for i, j in enumerate(pairs)]
    seen = [values for values in kept if values is not None]
    return BlockSimilarities(
        {kind: sum(values[kind] for values in seen) / max(1, len(seen)) for kind in KINDS},
        tuple(0.0 if values is None else score(values) for values in kept),
        len(seen),
    )


def _every_pair(
    depths: tuple[int, int],
    ours: Callable[[int], BlockMatrices],
    theirs: Callable[[int], BlockMatrices],
    held: int,
) -> dict[tuple[int, int], dict[str, float]]:
    found: dict[tuple[int, int], dict[str, float]] = {}
    group: dict[int, BlockMatrices] = {}
    for i in range(depths[0]):
        group[i] = ours(i)
        size = sum(_bytes(matrices) for matrices in group.values())
        last = i == depths[0] - 1
        if not last and size + size // len(group) <= held:
            continue
        for j in range(depths[1]):
            other = theirs(j)
            found |= {(k, j): similarities(matrices, other) for k, matrices in group.items()}
        group = {}
    return found


def _bytes(matrices: BlockMatrices) -> int:
    return sum(t.numel() * t.element_size() for parts in matrices.values() for t in parts)


def match_blocks(table: Tensor) -> list[int | None]:
    """Return the best order-keeping match of suspect blocks to base blocks, from (n, m)."""
    n, m = table.shape
    best = torch.zeros(n + 1, m + 1, dtype=torch.float64)
    for i in range(n):
        for j in range(m):
            take = best[i, j] + table[i, j]
            best[i + 1, j + 1] = max(take, best[i, j + 1], best[i + 1, j])
    found: list[int | None] = [None] * n
    i, j = n, m
    while i and j:
        if math.isclose(float(best[i, j]), float(best[i - 1, j])):
            i -= 1
        elif math.isclose(float(best[i, j]), float(best[i, j - 1])):
            j -= 1
        else:
            i, j = i - 1, j - 1
            found[i] = j
    return found
