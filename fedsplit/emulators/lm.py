"""Language-model loss and perplexity on packed token blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsplit.data.batches import epoch_batches
from fedsplit.emulators.compression.structure import Model
from fedsplit.errors import DataError, check
from fedsplit.models.modes import evaluating

IGNORED = -100  # as a label: nothing is to be predicted here


def check_tokens(name: str, tokens: Any, rows: int = 1) -> Tensor:
    """Return ``tokens`` if they are ids (N, T) with N >= rows, T >= 2.

    Raises:
        DataError: names the shape and the bound.
    """
    good = isinstance(tokens, Tensor) and tokens.dim() == 2 and not tokens.is_floating_point()
    if not good or len(tokens) < rows or tokens.shape[1] < 2:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise DataError(f"{name} {shape}: must be integer ids (N, T), N >= {rows}, T >= 2")
    checked: Tensor = tokens
    return checked


def pack(ids: Tensor, length: int) -> Tensor:
    """Cut one long text of ids (n,) into blocks (n // length, length); the rest is left out.

    Raises:
        DataError: if there is not one block.
    """
    check(length >= 2, "length", length, ">= 2 (tokens)")
    rows = len(ids) // length
    if rows == 0:
        raise DataError(f"ids: {len(ids)} tokens: must be >= {length}, one block")
    return ids[: rows * length].view(rows, length)


@dataclass(frozen=True)
class LabelledBlocks:
    """Token blocks of which some tokens alone are to be predicted: the completions of prompts.

    Attributes:
        ids: (N, T), padded on the right.
        labels: (N, T), see :func:`lm_loss`; some in each block.
    """

    ids: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        check_tokens("ids", self.ids)
        if self.labels.shape != self.ids.shape:
            raise DataError(f"labels {tuple(self.labels.shape)}: must be {tuple(self.ids.shape)}")
        if empty := int((target_counts(self.labels) == 0).sum()):
            raise DataError(f"{empty} blocks without a label: every one must have some")

    @classmethod
    def of(cls, blocks: Tensor | LabelledBlocks) -> LabelledBlocks:
        """Return ids (N, T) with every next token to be predicted, or ``blocks`` as they are.

        Raises:
            DataError: if a tensor is not ids (N, T).
        """
        if isinstance(blocks, LabelledBlocks):
            return blocks
        check_tokens("tokens", blocks)
        return cls(blocks, blocks)

    def __len__(self) -> int:
        return len(self.ids)

    def targets(self) -> int:
        """Return how many tokens are predicted."""
        return int(target_counts(self.labels).sum())


def step_blocks(tokens: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
    """Return the token blocks (B, T) of a step: each epoch in an order of its own."""
    return tokens[step_rows(len(tokens), batch_size, seed, step)]


def step_rows(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return which of ``count`` blocks a step takes, (B,): each epoch in an order of its own."""
    size = min(batch_size, count)
    epoch, place = divmod(step, count // size)
    return torch.from_numpy(epoch_batches(count, size, seed, epoch)[place])


def logits_of(model: Model, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return logits (B, T, V) of ids (B, T) without padding; the cache is off.

    Args:
        model: of a causal language model.
        ids: (B, T).
        positions: of packed samples (:mod:`fedsplit.emulators.packing`), (B, T), else None.
    """
    if positions is not None:  # and no mask: that of packed samples follows from their positions
        packed: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return packed
    mask = torch.ones_like(ids)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def lm_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy (nats) of each next token.

    Args:
        logits: (B, T, V).
        labels: (B, T), the ids, or :data:`IGNORED` where nothing is to be predicted.
        reduction: ``mean`` over what is predicted, ``sum``, or ``none``: (B (T-1),), 0 elsewhere.
    """
    flat = logits[:, :-1].float().flatten(0, 1)  # (B (T-1), V)
    following = labels[:, 1:].flatten()
    return F.cross_entropy(flat, following, reduction=reduction, ignore_index=IGNORED)


def target_counts(labels: Tensor) -> Tensor:
    """Return how many tokens of each row of ``labels`` (B, T) are predicted, (B,)."""
    return (labels[:, 1:] != IGNORED).sum(1)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return the mean KL(target || logits) over the next tokens, in nats: both (B, T, V)."""
    theirs = F.log_softmax(target.float(), -1).flatten(0, 1)  # (B T, V)
    mine = F.log_softmax(logits.float(), -1).flatten(0, 1)
    return F.kl_div(mine, theirs, log_target=True, reduction="batchmean")


@torch.no_grad()
def mean_loss(
    model: Model,
    tokens: Tensor,
    batch_size: int = 16,
    *,
    labels: Tensor | None = None,
    positions: Tensor | None = None,
) -> float:
    """Return the mean next-token loss in nats over blocks (N, T); its exp is the perplexity.

    Args:
        model: of a causal language model.
        tokens: (N, T).
        batch_size: blocks at a time.
        labels: see :func:`lm_loss`; None: the tokens.
        positions: see :func:`logits_of`.

    Raises:
        DataError: if ``tokens`` are not ids (N, T).
    """
    check_tokens("tokens", tokens)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        every = tokens if labels is None else labels
        for at in range(0, len(tokens), batch_size):
            rows = slice(at, at + batch_size)
            placed = None if positions is None else positions[rows].to(device)
            wanted = every[rows].to(device)
            logits = logits_of(model, tokens[rows].to(device), placed)
            total += float(lm_loss(logits, wanted, "sum"))
            count += int(target_counts(wanted).sum())
    return total / count


def perplexity(model: Model, tokens: Tensor, batch_size: int = 16) -> float:
    """Return exp of :func:`mean_loss`."""
    return math.exp(min(mean_loss(model, tokens, batch_size), 700.0))
