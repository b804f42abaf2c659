"""Selective rank compression: truncated SVD of the attention projections (ScaleOT, stage 2).

``TRUNCATIONS`` says what a truncation keeps closest: ``weights``, as ScaleOT has it, or ``outputs``
of the projections on public text (the approximation is SVD-LLM's, see
:func:`fedsplit.emulators.compression.svd.truncate_outputs`).  SmolLM2-135M loses its language
when a quarter of its attention's ranks go by weights (docs/results/llm.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.emulators.compression.linears import LowRankLinear, bias_of, matrix_of, set_matrix
from fedsplit.emulators.compression.moments import collect_inputs
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.compression.svd import (
    Factors,
    input_root,
    truncate,
    truncate_outputs,
    truncated_rank,
)
from fedsplit.emulators.planning.plan import check_fraction
from fedsplit.errors import ConfigError, UnsupportedModelError
from fedsplit.models.layout.projections import BlockLayout, Site

ATTENTION = ("q", "k", "v", "o")
FFN = ("up", "gate", "down")
CALIBRATION = 256  # token blocks that moments are taken of, the first ones
TRUNCATIONS = ("weights", "outputs")
# Projections that take the same input as another: their moments are that one's.
SAME_INPUT = {"k": "q", "v": "q", "gate": "up"}


def roles(layout: BlockLayout, attention: bool = True, ffn: bool = False) -> list[str]:
    """Return the projections to compress: attention only, as ScaleOT does, unless asked."""
    wanted = (ATTENTION if attention else ()) + (FFN if ffn else ())
    return [role for role in layout.sites() if role in wanted]


def roots_of(
    model: Model,
    layout: BlockLayout,
    blocks: Sequence[int],
    tokens: Tensor,
    *,
    attention: bool = True,
    ffn: bool = False,
    batch_size: int = 8,
) -> dict[int, dict[str, Tensor]]:
    """Return roots of the second moments of what enters each projection, by block and role.

    One forward pass of the whole model over the first :data:`CALIBRATION` token blocks: what stands
    in front of a projection in an emulator is not what stood there.  Memory: two (n, n) float64
    matrices a block for attention, two for the FFN.

    Raises:
        DataError: if tokens are not ids (N, T).
        ModelError: if activations are not finite.
        UnsupportedModelError: if a projection is not run as a layer of its own.
    """
    chosen, sites = roles(layout, attention, ffn), layout.sites()
    own = {role: SAME_INPUT.get(role, role) for role in chosen}
    names = {role: module_of(sites[role]) for role in own.values()}
    layers = [(i, name) for i in blocks for name in dict.fromkeys(names.values())]
    found = collect_inputs(model, tokens[:CALIBRATION], layers, batch_size)
    lacking = [key for key in layers if key not in found]
    if lacking:
        raise UnsupportedModelError(
            f"block {lacking[0][0]}, {lacking[0][1]}: nothing was run through this layer; use "
            "truncation='weights'"
        )
    roots = {key: input_root(found.pop(key)) for key in layers}
    return {i: {role: roots[i, names[own[role]]] for role in chosen} for i in blocks}


def compress_block(
    block: nn.Module,
    layout: BlockLayout,
    beta: float,
    *,
    attention: bool = True,
    ffn: bool = False,
    seed: int = 0,
    roots: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Truncate projections of one block to r = max(1, floor((1 - beta) min(m, n))), in place.

    Each of Q, K and V is truncated by itself, fused in one matrix or not.  Where the factors are
    smaller than the matrix they replace it (:class:`LowRankLinear`), otherwise the matrix keeps its
    shape and loses its rank.  ``beta = 0`` changes nothing, bit for bit.

    Args:
        block: a block that owns its storage.
        layout: of the model's blocks.
        beta: rank reduction in [0, 1].
        attention: compress Q, K, V and O (ScaleOT's choice).
        ffn: compress the FFN as well (the published sweeps show that it hurts both sides).
        seed: of the randomised method.
        roots: by role (:func:`roots_of`), to keep outputs closest instead of weights.

    Returns:
        One record for each truncated projection: role, rank, relative Frobenius error.

    Raises:
        ConfigError: if beta is not in [0, 1], or nothing is selected.
    """
    check_fraction("beta", beta)
    chosen = roles(layout, attention, ffn)
    if not chosen:
        raise ConfigError("attention=False, ffn=False: must select projections to compress")
    factors: dict[str, Factors] = {}
    for role in chosen:
        matrix = read_site(block, layout.sites()[role])
        rank = truncated_rank(matrix.shape[0], matrix.shape[1], beta)
        if rank >= min(matrix.shape):
            continue
        if roots is None:
            factors[role] = truncate(matrix, rank, seed=seed)
        else:
            factors[role] = truncate_outputs(matrix, roots[role], rank, seed=seed)
    apply_factors(block, layout, factors)
    return [{"role": r, "rank": f.rank, "error": round(f.error, 6)} for r, f in factors.items()]


def read_site(block: nn.Module, site: Site) -> Tensor:
    """Return one projection's weight (out, in), as stored: nothing folded in."""
    matrix = matrix_of(block.get_submodule(module_of(site)))
    return matrix if site.rows is None else matrix[list(site.rows)]


def module_of(site: Site) -> str:
    """Return the name of the linear layer, relative to the block, that holds a projection."""
    return site.weight.rpartition(".")[0]


def apply_factors(block: nn.Module, layout: BlockLayout, factors: Mapping[str, Factors]) -> None:
    """Put low-rank projections into ``block``: real factors where smaller, else dense, in place.

    Args:
        block: a block that owns its storage.
        layout: of the model's blocks.
        factors: by role; projections not named stay as they are.
    """
    by_module: dict[str, dict[str, Site]] = {}
    for role, site in layout.sites().items():
        by_module.setdefault(module_of(site), {})[role] = site
    for name, sites in by_module.items():
        mine = {role: factors[role] for role in sites if role in factors}
        if not mine:
            continue
        module = block.get_submodule(name)
        matrix = matrix_of(module)
        groups = {role: _rows(site, len(matrix)) for role, site in sites.items()}
        covered = sum(len(rows) for rows in groups.values()) == len(matrix)
        rank = sum(f.rank for f in mine.values())
        ups = sum(f.up.numel() for f in mine.values())
        smaller = rank * matrix.shape[1] + ups < matrix.numel()
        if covered and len(mine) == len(sites) and smaller:
            block.set_submodule(name, _factored(matrix, bias_of(module), groups, mine))
        else:
            dense = matrix.clone()
            for role, factor in mine.items():
                dense[groups[role]] = factor.dense().to(dense.dtype)
            set_matrix(module, dense, bias_of(module))


def _rows(site: Site, total: int) -> list[int]:
    return list(range(total)) if site.rows is None else list(site.rows)


@torch.no_grad()
def _factored(
    matrix: Tensor,
    bias: Tensor | None,
    groups: Mapping[str, list[int]],
    factors: Mapping[str, Factors],
) -> LowRankLinear:
    ordered = list(factors)
    flat = [row for role in ordered for row in groups[role]]
    made = LowRankLinear(
        int(matrix.shape[1]),
        [len(groups[role]) for role in ordered],
        [factors[role].rank for role in ordered],
        bias=bias is not None,
        permuted=flat != list(range(len(flat))),
        like=matrix,
    )
    made.down.copy_(torch.cat([factors[role].down for role in ordered]))
    for i, role in enumerate(ordered):
        made.group(i).copy_(factors[role].up)
    if made.order is not None:
        made.set_order([groups[role] for role in ordered])
    if bias is not None:
        made.get_parameter("bias").copy_(bias)
    return made


def compressed_numel(layout: BlockLayout, beta: float, attention: bool, ffn: bool) -> int:
    """Return by how many parameters :func:`compress_block` makes one block smaller (exact)."""
    saved = 0
    by_module: dict[str, list[tuple[str, int, int]]] = {}
    for role, site in layout.sites().items():
        stored = layout.shapes[site.weight]
        rows, columns = stored[::-1] if site.transposed else stored
        count = rows if site.rows is None else len(site.rows)
        by_module.setdefault(site.weight, []).append((role, count, columns))
    chosen = roles(layout, attention, ffn)
    for parts in by_module.values():
        if not all(role in chosen for role, _, _ in parts):
            continue
        ranks = [truncated_rank(m, n, beta) for _, m, n in parts]
        if any(r >= min(m, n) for r, (_, m, n) in zip(ranks, parts, strict=True)):
            continue
        whole = sum(m * n for _, m, n in parts)
        size = sum(r * (m + n) for r, (_, m, n) in zip(ranks, parts, strict=True))
        saved += max(0, whole - size)
    return saved
