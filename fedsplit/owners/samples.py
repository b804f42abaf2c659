"""An owner's samples as token ids in slots, the only names the server ever hears for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Tokenised texts and private labels of one split, in slot order.

    Attributes:
        ids: one int64 tensor (T_i,) per slot, without padding.
        labels: one class per slot, or None for causal language modelling.
    """

    ids: tuple[Tensor, ...]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens per slot."""
        return [int(x.shape[0]) for x in self.ids]

    def identity(self, slot: int) -> bytes:
        """Return what identifies the slot's text wherever its views are counted."""
        return text_identity(self.ids[slot])

    def padded(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return (input_ids, attention_mask), both (B, T), right-padded with id 0.

        The padding id is irrelevant: masked positions are neither sent nor used.
        """
        chosen = [self.ids[slot] for slot in slots]
        width = max(int(x.shape[0]) for x in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        mask = torch.zeros(len(chosen), width, dtype=torch.int64)
        for row, x in enumerate(chosen):
            ids[row, : x.shape[0]] = x
            mask[row, : x.shape[0]] = 1
        return ids, mask


def text_identity(ids: Tensor, after: int = 0) -> bytes:
    """Return what identifies a text, or a piece of one.

    Args:
        ids: its tokens (T,).
        after: number of the text that a piece continues; 0: it is a whole text.
    """
    return ids.to(torch.int64).numpy().astype("<i8").tobytes() + (b"%d" % after if after else b"")


def tokenise(
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[int] | None,
    *,
    max_tokens: int,
    classes: int,
    order: np.ndarray | None = None,
    shortest: int = 0,
) -> Samples:
    """Tokenise texts into slots.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the owner's texts.
        labels: class per text, or None for causal language modelling.
        max_tokens: longer texts are cut.
        classes: number of classes the parties agreed on.
        order: permutation of the texts; slot i holds text ``order[i]``.  A source sorted by label
            would otherwise tell labels by slot.
        shortest: fewest tokens of a text; 0 = 1 with labels, 2 without, since a language-modelling
            sample needs a next token.

    Raises:
        DataError: no text, a text without tokens, or a label outside [0, classes).
    """
    if not texts:
        raise DataError("owner's split has 0 texts: must be >= 1")
    if order is not None:
        texts = [texts[i] for i in order]
        labels = None if labels is None else [labels[i] for i in order]
    if labels is not None:
        for slot, label in enumerate(labels):
            if not 0 <= int(label) < classes:
                raise DataError(f"label={label} (slot {slot}): must be in [0, {classes})")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    shortest = shortest or (1 if labels is not None else 2)
    for slot, ids in enumerate(encoded):
        if len(ids) < shortest:
            raise DataError(f"text in slot {slot} has {len(ids)} tokens: must be >= {shortest}")
    return Samples(
        tuple(torch.tensor(ids, dtype=torch.int64) for ids in encoded),
        None if labels is None else torch.tensor([int(x) for x in labels], dtype=torch.int64),
    )
