"""One pass over public candidates: the best of each row, without a (tokens, V) matrix.

argmin_v ||x - e_v||^2 = argmax_v (x . e_v - ||e_v||^2 / 2): one matrix product per block with the
norms as its bias.  Without the norms (dot product alone) it is a different, wrong search: at zero
noise it moves 98 % of MiniLM's tokens.  Blocks stay in cache and are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.denoising.candidates import Candidates, Rows, rows_by_position
from fedsplit.privacy.denoising.position_candidates import AdditiveCandidates

QUERY_BLOCK, VOCAB_BLOCK, GROUPS = 2048, 2048, 16
PART = 128  # rows whose scores stay in cache while they are worked on


def block_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and where: ``(n, v) -> (n, k), (n, k)``, in any order.

    Exact.  On the CPU numpy's vectorised selections are several times torch's, and only the k best
    of v/16 strided groups (by their maxima) are looked into: the k largest cannot lie outside them.
    """
    n, v = scores.shape
    k = min(k, v)
    if scores.device.type != "cpu":
        best = scores.topk(k, dim=1, sorted=False)
        return best.values, best.indices
    if k == 1:
        at = torch.from_numpy(np.argmax(scores.numpy(), axis=1)).unsqueeze(1)
        return scores.gather(1, at), at
    width = v // GROUPS
    if width < 2 * k:
        at = torch.from_numpy(np.argpartition(scores.numpy(), -k, axis=1)[:, -k:].copy())
        return scores.gather(1, at), at
    peak = scores[:, : width * GROUPS].view(n, GROUPS, width).amax(1)  # (n, width)
    group = torch.from_numpy(np.argpartition(peak.numpy(), -k, axis=1)[:, -k:].copy())  # (n, k)
    at = (group.unsqueeze(1) + width * torch.arange(GROUPS)[:, None]).flatten(1)  # (n, 16 k)
    if width * GROUPS < v:
        at = torch.cat([at, torch.arange(width * GROUPS, v).expand(n, -1)], dim=1)
    inside = scores.gather(1, at)
    keep = torch.from_numpy(np.argpartition(inside.numpy(), -k, axis=1)[:, -k:].copy())
    return inside.gather(1, keep), at.gather(1, keep)


def merge_block(best: Tensor, ids: Tensor, scores: Tensor, first: int) -> None:
    """Merge one block of scores into the running top k, in place and in no order.

    Args:
        best: running scores, ``(n, k)``, -inf where there is none yet.
        ids: their candidates, ``(n, k)``.
        scores: ``(n, v)`` of candidates ``first ... first + v``.
        first: id of the block's first candidate.
    """
    n, k = best.shape
    if k == 1 or scores.device.type != "cpu":
        values, at = block_top(scores, k)
    else:
        # Later blocks hold only a few elements above a row's k-th best: take just those.
        bar = best.numpy().min(axis=1, keepdims=True)
        flat = np.flatnonzero(scores.numpy() > bar)
        if flat.size > 2 * k * n:
            values, at = block_top(scores, k)
        else:
            row, column = np.divmod(flat, scores.shape[1])
            count = np.bincount(row, minlength=n)
            slot = np.arange(flat.size) - np.repeat(np.cumsum(count) - count, count)
            values = torch.full((n, max(int(count.max()), 1)), -torch.inf)
            at = torch.zeros(values.shape, dtype=torch.int64)
            values.numpy()[row, slot] = scores.numpy().ravel()[flat]
            at.numpy()[row, slot] = column
    at = at + first
    if k == 1:
        better = values > best
        best.copy_(torch.where(better, values, best))
        ids.copy_(torch.where(better, at, ids))
        return
    both, which = torch.cat([best, values], dim=1), torch.cat([ids, at], dim=1)
    keep = block_top(both, k)[1]
    best.copy_(both.gather(1, keep))
    ids.copy_(which.gather(1, keep))


def product_blocks(queries: Tensor, candidates: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``x . e - ||e||^2 / 2`` in blocks that stay in cache: (query start, id start, (n, v)).

    The yielded tensor is overwritten by the next step.

    Args:
        queries: ``(N, d)``.
        candidates: ``(V, d)``.
    """
    buffer = torch.empty(QUERY_BLOCK * VOCAB_BLOCK, device=queries.device)
    for v in range(0, len(candidates), VOCAB_BLOCK):
        block = candidates[v : v + VOCAB_BLOCK]  # (v, d)
        bias = torch.linalg.vecdot(block, block).mul_(-0.5)
        for q in range(0, len(queries), QUERY_BLOCK):
            rows = queries[q : q + QUERY_BLOCK]  # (n, d)
            out = buffer[: len(rows) * len(block)].view(len(rows), len(block))
            yield q, v, torch.addmm(bias, rows, block.T, out=out)


@dataclass
class Products:
    """One block of rows against one block of candidates.

    Attributes:
        here: which rows.
        first: id of the first candidate.
        scores: ``x . e - ||e||^2 / 2``, ``(n, v)``; overwritten by the next block.
        table: ``(v, d)``; the candidates themselves where ``gains`` is None.
        gains, shrinks: ``(n, v)``, see
            :class:`fedsplit.privacy.denoising.position_candidates.AdditiveCandidates`.
    """

    here: slice
    first: int
    scores: Tensor
    table: Tensor
    gains: Tensor | None = None
    shrinks: Tensor | None = None


def products(rows: Rows, candidates: Candidates) -> Iterator[Products]:
    """Yield every row against every candidate of its position, in blocks that stay in cache."""
    if isinstance(candidates, AdditiveCandidates):
        for part in candidates.products(rows, PART):
            yield Products(*part)
        return
    for first, block in candidates.blocks():  # block (P, v, d)
        for p, (start, stop) in enumerate(rows.bounds):
            if start == stop:
                continue
            for q, v, scores in product_blocks(rows.rows[start:stop], block[p]):
                here = slice(start + q, start + q + len(scores))
                yield Products(here, first + v, scores, block[p, v : v + scores.shape[1]])


def search(
    representations: Sequence[Tensor],
    candidates: Candidates,
    top_k: int = 1,
    *,
    log_likelihood: Callable[[Tensor], Tensor] | None = None,
    log_prior: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Find each token's best candidates, exactly (up to float32 rounding).

    Args:
        representations: per sample ``(T_i, d)``.
        candidates: V vectors, per position or for all.
        top_k: how many to return.
        log_likelihood: of squared distances, in place if it likes; None: nearest in L2.
        log_prior: ``(V,)``, added to the log-likelihood.

    Returns:
        Per sample: ids ``(T_i, k)``, best first, and scores ``(T_i, k)``: squared distances where
        there is no likelihood, else unnormalised log-posteriors.
    """
    check(top_k >= 1, "top_k", top_k, ">= 1 (candidates)")
    rows = rows_by_position(representations, candidates)
    device = candidates.device
    k = min(top_k, candidates.vocab_size)
    n = len(rows.rows)
    best = torch.full((n, k), -torch.inf, device=device)
    ids = torch.zeros((n, k), dtype=torch.int64, device=device)
    norms = torch.linalg.vecdot(rows.rows, rows.rows).unsqueeze(1)  # (N, 1)
    prior = check_prior(log_prior, candidates)
    for part in products(rows, candidates):
        if log_likelihood is not None:
            posterior_(part.scores, norms[part.here], log_likelihood, prior, part.first)
        merge_block(best[part.here], ids[part.here], part.scores, part.first)
    best, order = best.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    if log_likelihood is None:
        best = (norms - 2 * best).clamp_(min=0)
    return rows.split(ids), rows.split(best)


def check_prior(log_prior: Tensor | None, candidates: Candidates) -> Tensor | None:
    """Return the prior on the candidates' device.

    Raises:
        PrivacyError: unless it has one entry per candidate.
    """
    if log_prior is None:
        return None
    if log_prior.shape != (candidates.vocab_size,):
        raise PrivacyError(
            f"log_prior.shape={tuple(log_prior.shape)}: must be ({candidates.vocab_size},)"
        )
    return log_prior.to(candidates.device, torch.float32)


def posterior_(
    scores: Tensor,
    norms: Tensor,
    log_likelihood: Callable[[Tensor], Tensor],
    log_prior: Tensor | None,
    first: int,
) -> None:
    """Turn products into unnormalised log-posteriors, in place.

    Args:
        scores: ``x . e - ||e||^2 / 2``, ``(n, v)``; overwritten.
        norms: squared norms of x, ``(n, 1)``.
        log_likelihood: of squared distances.
        log_prior: ``(V,)`` or None.
        first: id of the block's first candidate.
    """
    prior = None if log_prior is None else log_prior[first : first + scores.shape[1]]
    parts = zip(torch.split(scores, PART), torch.split(norms, PART), strict=True)  # stay in cache
    for part, norm in parts:
        part.mul_(-2).add_(norm).clamp_(min=0)
        log = log_likelihood(part)
        torch.add(log, prior if prior is not None else 0.0, out=part)
