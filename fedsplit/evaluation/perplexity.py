"""Perplexity of a long text by sliding windows, with an interval over blocks of the text.

Every token but the first is predicted exactly once, from at least ``window - stride`` tokens before
it (fewer only at the text's beginning): without the overlap, tokens at the start of each window
would be predicted from nothing, and the figure would depend on where the windows happen to fall.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import Tensor

from fedsplit.errors import DataError, check
from fedsplit.models.modes import evaluating
from fedsplit.models.positions import longest

Model: TypeAlias = Any  # a Hugging Face causal language model
Floats = npt.NDArray[np.float64]

# Floats of one batch's logits: 256 MB in fp32.
LOGITS = 1 << 26


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts one text.

    Attributes:
        nats: mean loss of a token.
        interval: 95 % interval of ``nats`` over blocks; None for a single block.
        tokens: predicted.
        block_nats: summed loss of each block (S,).
        block_tokens: predicted tokens of each block (S,).
    """

    nats: float
    interval: tuple[float, float] | None
    tokens: int
    block_nats: Floats
    block_tokens: Floats

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(min(self.nats, 700.0))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the blocks themselves are left out."""
        low_high = None if self.interval is None else list(self.interval)
        return {
            "nats_per_token": self.nats,
            "interval": low_high,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "blocks": len(self.block_nats),
        }


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first predicted position) of each window over ``length`` tokens.

    All windows have the same length, ``min(window, length)``.

    Raises:
        ConfigError: unless 1 <= stride < window.
        DataError: if there is nothing to predict.
    """
    check(window >= 2, "window", window, ">= 2 (tokens)")
    check(1 <= stride < window, "stride", stride, f"in 1..{window - 1} (tokens)")
    if length < 2:
        raise DataError(f"text: {length} tokens: must be >= 2")
    end = min(window, length)
    yield 0, end, 1
    while end < length:
        done, end = end, min(end + stride, length)
        yield end - window, end, done


def text_loss(
    model: Model,
    ids: Tensor,
    *,
    window: int = 512,
    stride: int = 0,
    blocks: int | None = None,
    batch_size: int = 0,
) -> TextLoss:
    """Measure a model on one text of ids (n,); the cache is off and no dropout runs.

    Args:
        model: a causal language model.
        ids: token ids, at least two.
        window: longest context plus one; cut to what the model's positions allow.
        stride: predicted tokens of a window after the first; 0: half the window.
        blocks: measure the first so many windows only.
        batch_size: windows at a time; 0: by the size of their logits.

    Raises:
        ConfigError: a number is out of its range.
        DataError: less than two tokens, or ids that the model has no embedding for.
    """
    check(blocks is None or blocks >= 1, "blocks", blocks, ">= 1 or none")
    if ids.dim() != 1 or ids.is_floating_point():
        raise DataError(f"ids {tuple(ids.shape)}: must be integer ids (n,)")
    window = min(window, longest(model))
    places = list(windows(len(ids), window, stride or max(1, window // 2)))[:blocks]
    rows = vocabulary(model)
    if int(ids.max()) >= rows or int(ids.min()) < 0:
        raise DataError(f"ids: up to {int(ids.max())}: must be in 0..{rows - 1}")
    width = places[0][1] - places[0][0]
    size = batch_size or max(1, LOGITS // (width * rows))
    device = next(model.parameters()).device
    sums: list[float] = []
    counts: list[int] = []
    with torch.no_grad(), evaluating(model):
        for at in range(0, len(places), size):
            some = places[at : at + size]
            batch = torch.stack([ids[start:end] for start, end, _ in some]).to(device)
            logits = forward(model, batch).logits  # (B, T, V)
            for row, (start, end, first) in enumerate(some):
                own = logits[row, first - start - 1 : end - start - 1].float()
                true = batch[row, first - start :]
                loss = torch.nn.functional.cross_entropy(own, true, reduction="none")
                sums.append(float(loss.double().sum()))
                counts.append(end - first)
    return summed(np.asarray(sums), np.asarray(counts, dtype=np.float64))


def summed(block_nats: Floats, block_tokens: Floats) -> TextLoss:
    """Return the mean over all tokens, and its interval over blocks.

    The interval is Student's with S - 1 degrees of freedom around the ratio of the two sums (its
    linearised variance): tokens of one block fall together, blocks are taken as independent.
    """
    total = float(block_tokens.sum())
    mean = float(block_nats.sum()) / total
    count = len(block_nats)
    interval = None
    if count >= 2:
        residual = block_nats - mean * block_tokens
        deviation = math.sqrt(count / (count - 1) * float((residual**2).sum())) / total
        half = float(stdtrit(count - 1, 0.975)) * deviation
        interval = (mean - half, mean + half)
    return TextLoss(mean, interval, round(total), block_nats, block_tokens)


def text_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the ids (n,) of all texts as one, without special tokens.

    Raises:
        DataError: if less than two tokens come out.
    """
    found = tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    if len(found) < 2:
        raise DataError(f"text: {len(found)} tokens: must be >= 2")
    return torch.tensor(found, dtype=torch.int64)


def forward(model: Model, ids: Tensor, **settings: Any) -> Any:
    """Run ids (B, T) without padding; the cache is off unless asked for."""
    settings.setdefault("use_cache", False)
    settings.setdefault("attention_mask", torch.ones_like(ids))
    return model(input_ids=ids, **settings)


def vocabulary(model: Model) -> int:
    """Return the rows of the model's input embeddings."""
    return int(model.get_input_embeddings().num_embeddings)
